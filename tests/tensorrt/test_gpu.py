"""On a GPU that an installed TensorRT supports: the conformance suite with real engines. Has not run anywhere yet.

As for the graph backend, the bound says "this is the same network", no more: bfloat16 keeps 8 bits.
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
    if reason := base.why_not("tensorrt", device="cuda"):
        pytest.skip(reason)
    built: dict[str, Subject] = {}

    def get(kind: str) -> Subject:
        if kind not in built:
            built[kind] = Subject(
                lambda model, config: base.build("tensorrt", model, config), kind,
                tolerance=BFLOAT16_BOUND, device="cuda", dtype_of=bfloat16, config_changes=SIZES,
            )  # fmt: skip
        return built[kind]

    return get


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_engines_on_a_gpu(subjects, kind, check):
    CHECKS[check](subjects(kind))
