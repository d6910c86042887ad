"""Names for Gymnasium: vivace/Conveyor-v0 with task=..., and one name for each task, vivace/Conveyor-perturb-v0."""

from __future__ import annotations

from typing import Any

import gymnasium

ENVIRONMENT = "vivace/Conveyor-v0"
_MAKER = "vivace.sim.registration:make"


def register() -> None:
    """Tell Gymnasium, once."""
    from .tasks import TASKS

    names = {ENVIRONMENT: {}, **{f"vivace/Conveyor-{name}-v0": {"task": name} for name in TASKS}}
    for name, kwargs in names.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=_MAKER, kwargs=kwargs)


def make(task: str = "conveyor", **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """A ConveyorEnv; images=True by Gymnasium's convention, that an observation is everything an agent sees."""
    from .conveyor import ConveyorEnv

    return ConveyorEnv(task, **{"images": True, **kwargs})
