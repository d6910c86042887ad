"""One training step, the moving average of the weights, and a state that can be saved and resumed bit for bit.

Everything random of step k is a function of (seed, k): which rows, which noise, times, committed actions and brightness.
So a run that was cut off and resumed is the run that was not, on the same device and torch version (a test proves it for
the CPU), and the order of the data does not depend on how fast anything was.

On a GPU the loss runs in bfloat16 autocast over float32 weights and is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.safetensors_io import read_header, read_tensor, write_safetensors
from ..checkpoints.source import Checkpoint
from ..config import ModelConfig
from ..errors import CheckpointError, NumericsError
from ..model import weights
from ..model.pi import Pi
from . import objective
from .config import Optimise
from .frames import Frames
from .initialise import fresh

FINAL_RATE = 0.01
NUMERICS: dict[str, Any] = {"time_grid": "direct", "flavour": "lerobot", "declared_dtype": "float32"}
"""Fields of a ModelConfig that do not change what weights mean."""


@dataclass(frozen=True)
class Measured:
    """Of one step: tensors, so that reading them is the caller's choice of when to wait."""

    loss: Tensor
    norm: Tensor


class Learner:
    """Network, average, optimiser. `step` is the number of steps taken."""

    def __init__(
        self, config: ModelConfig, optimise: Optimise, *, device: torch.device, compiled: bool = False
    ) -> None:
        self.optimise, self.device, self.compiled = optimise, device, compiled
        self.model = fresh(config, seed=optimise.seed, device=device)
        self.model.ops = objective.training_ops()
        self.average = fresh(config, seed=optimise.seed, device=device).requires_grad_(False)
        self.step = 0
        gains = [p for p in self.model.parameters() if p.ndim < 2]
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": optimise.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=optimise.learning_rate, betas=(0.9, 0.95), fused=True)
        self._loss: Callable[[Pi, objective.Batch, objective.Draws], Tensor] = objective.loss
        if compiled:
            self._loss = torch.compile(objective.loss, dynamic=False)

    def warm(self, tokens: int, *, views: int) -> None:
        """Compile for prompts of `tokens` tokens: one step's work on zeros, without a step."""
        o, config, device = self.optimise, self.model.config, self.device
        size, shape = config.vision.image_size, (o.batch, o.flows, config.horizon, config.action_width)
        batch = objective.Batch(
            images=torch.zeros(o.batch, views, 3, size, size, device=device),
            tokens=torch.zeros(o.batch, tokens, dtype=torch.int64, device=device),
            token_mask=None, actions=torch.zeros(shape, device=device),
        )  # fmt: skip
        committed = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        draws = objective.Draws(torch.zeros(shape, device=device), torch.ones(shape[:2], device=device), committed)
        self.rehearse(batch, draws)

    def rehearse(self, batch: objective.Batch, draws: objective.Draws) -> None:
        """The work of a step without the step."""
        self._forward(batch, draws).backward()
        self.adam.zero_grad(set_to_none=True)

    def begin_from(self, checkpoint: Checkpoint) -> None:
        """Take a trained policy's weights. Raises CheckpointError if it is another network."""
        if replace(checkpoint.model, **NUMERICS) != replace(self.model.config, **NUMERICS):
            raise CheckpointError(
                f"{checkpoint.path} is another network than the recipe's",
                got=checkpoint.model,
                wanted=self.model.config,
            )
        loaded = weights.load(
            checkpoint.model, checkpoint.tensors, device=self.device, dtype_of=lambda _: torch.float32
        )
        with torch.no_grad():
            for mine in (self.model, self.average):
                for parameter, value in zip(mine.parameters(), loaded.parameters(), strict=True):
                    parameter.copy_(value)

    def _forward(self, batch: objective.Batch, draws: objective.Draws) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self._loss(self.model, batch, draws)

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine down to a hundredth."""
        o = self.optimise
        if step < o.warmup_steps:
            return o.learning_rate * (step + 1) / o.warmup_steps
        share = min(1.0, (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps))
        return o.learning_rate * (FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * share)))

    def draw(self, frames: Frames) -> tuple[objective.Batch, objective.Draws]:
        """The examples and random numbers of the present step."""
        o, device = self.optimise, self.device
        generator = torch.Generator(device).manual_seed(o.seed * 1_000_003 + self.step)
        row = torch.randint(len(frames), (o.batch,), generator=generator, device=device)
        rows, shape = frames.rows(row), (o.batch, o.flows)
        times = objective.flow_times(shape, generator, device)
        some = torch.rand(shape, generator=generator, device=device) < o.committed_share
        committed = torch.randint(
            min(1, o.max_committed), o.max_committed + 1, shape, generator=generator, device=device
        )
        committed = torch.minimum(committed * some, frames.left[row][:, None])
        noise = torch.randn((*shape, frames.horizon, frames.width), generator=generator, device=device)
        gain = 1.0 + o.brightness * (2.0 * torch.rand(o.batch, 1, 1, generator=generator, device=device) - 1.0)
        colour = 1.0 + o.brightness / 4.0 * (2.0 * torch.rand(o.batch, 1, 3, generator=generator, device=device) - 1.0)
        images = (rows.images.float() / 255.0 * (gain * colour)[:, :, None, None]).clamp(0.0, 1.0) * 2.0 - 1.0
        mask = None
        if not frames.even:
            mask = torch.arange(rows.tokens.shape[1], device=device) < rows.length[:, None]
        batch = objective.Batch(
            images=images.permute(0, 1, 4, 2, 3).contiguous(), tokens=rows.tokens, token_mask=mask,
            actions=frames.targets(row, committed),
        )  # fmt: skip
        return batch, objective.Draws(noise, times, committed)

    def learn(self, batch: objective.Batch, draws: objective.Draws) -> Measured:
        """One step of the optimiser and of the average."""
        rate = self.rate(self.step)
        for group in self.adam.param_groups:
            group["lr"] = rate
        loss = self._forward(batch, draws)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimise.clip_norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.step += 1
        # early on, the average forgets its random beginning as fast as it can
        decay = min(self.optimise.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1.0 - decay)
        return Measured(loss.detach(), norm.detach())

    # --- save and resume --------------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Everything that the next step depends on, as safetensors."""
        table = dict(self._state())
        entries = [(name, value.dtype, tuple(value.shape)) for name, value in table.items()]
        scratch = file.with_suffix(".part")
        write_safetensors(
            scratch,
            entries,
            blocks=(value.detach().cpu() for value in table.values()),
            metadata={"step": str(self.step)},
        )
        scratch.replace(file)

    def resume(self, file: Path) -> None:
        """Raises CheckpointError unless the file is of the same network."""
        header = read_header(file)
        mine = dict(self._state(create=True))
        if {name: tuple(value.shape) for name, value in mine.items()} != {
            name: tuple(item.shape) for name, item in header.tensors.items()
        }:
            raise CheckpointError(
                f"{file} is the state of another network", do="resume with the recipe that it is from"
            )
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(read_tensor(header.tensors[name], value.device))
        self.step = int(header.metadata["step"])

    def _state(self, *, create: bool = False) -> Iterator[tuple[str, Tensor]]:
        for (name, parameter), average in zip(
            self.model.named_parameters(), self.average.parameters(), strict=True
        ):  # fmt: skip
            state = self.adam.state[parameter]
            if not state and create:
                state["step"] = torch.zeros((), device=self.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            yield f"weights.{name}", parameter
            yield f"average.{name}", average
            for key in sorted(state):
                yield f"adam.{key}.{name}", state[key]


def check_loss(step: int, value: float) -> None:
    """Raise NumericsError where training has diverged."""
    if not math.isfinite(value):
        raise NumericsError(f"the loss of step {step} is not finite", got=value, do="lower optimise.learning_rate")
