"""Backends for GPUs pass the suite there, in bfloat16, with a network whose sizes the kernels take.

The bound says "this is the same network", no more: bfloat16 keeps 8 bits, and an action passes some fifty roundings. That
it loses no more than plain bfloat16 is held by tests/backends/test_cuda_graph.py, and bits by the suite itself.
"""

from __future__ import annotations

import pytest
import torch
from suite import CHECKS, Subject

from vivace.backends import base
from vivace.config import GemmaConfig, VisionConfig
from vivace.precision.flavours import parameter_dtype

SIZES = {
    "vision": VisionConfig(width=144, layers=2, mlp_width=304, num_heads=2, patch_size=14, image_size=224),
    "prefix": GemmaConfig(width=512, layers=3, mlp_width=1024, num_heads=8, num_kv_heads=1, head_dim=256),
    "expert": GemmaConfig(width=256, layers=3, mlp_width=512, num_heads=8, num_kv_heads=1, head_dim=256),
}
BFLOAT16_BOUND = 0.05


def bfloat16(name):
    return parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")


@pytest.fixture(scope="module")
def subjects():
    """One backend per name and kind of policy, kept for the module: captures and engines take time."""
    built: dict[tuple[str, str], Subject] = {}

    def get(name: str, kind: str) -> Subject:
        if reason := base.why_not(name, device="cuda"):
            pytest.skip(f"{name}: {reason}")
        if (name, kind) not in built:
            built[name, kind] = Subject(
                lambda model, config: base.build(name, model, config), kind,
                tolerance=BFLOAT16_BOUND, device="cuda", dtype_of=bfloat16, config_changes=SIZES,
            )  # fmt: skip
        return built[name, kind]

    return get


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("name", ["cuda_graph", "tensorrt"])
def test_backend_on_a_gpu(subjects, name, kind, check):
    CHECKS[check](subjects(name, kind))
