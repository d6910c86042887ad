"""The shapes and dtypes written on the model's functions hold: checked here, at run time, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOOK = """
import sys
sys.path.insert(0, {here!r})
from jaxtyping import install_import_hook
checked = ["vivace.model.masks", "vivace.model.flow", "vivace.model.pi", "vivace.ops.reference"]
with install_import_hook(checked, "beartype.beartype"):
    import vivace.model.pi
import torch
from tiny import build, random_tensors, tiny_config
from vivace.backends import eager
from vivace.config import EngineConfig
from vivace.types import ModelInputs, PreviousChunk
"""
RUN = """
for kind in ("pi0", "pi05"):
    config = tiny_config(kind)
    backend = eager.create(build(config, random_tensors(config)), EngineConfig(num_denoise_steps=2))
    tokens, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    inputs = ModelInputs(torch.rand(2, 2, 3, 56, 56), tokens, token_mask=mask, state=torch.zeros(2, 32))
    cache, noise = backend.prefill(inputs), torch.randn(2, 7, 32)
    backend.denoise(cache, noise)
    backend.denoise(cache, noise, previous=PreviousChunk(noise, 2, "trained"))
    backend.denoise(cache, noise, previous=PreviousChunk(noise, 2, "guided", torch.ones(7)))
print("shapes hold")
"""
WRONG = """
from vivace.model import flow, masks
{call}
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    script = HOOK.format(here=str(HERE)) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_annotations_hold_over_a_whole_inference():
    done = run(RUN)
    assert "shapes hold" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("call", [
    "masks.with_suffix(torch.ones(2, 3), 4)",  # float instead of bool
    "masks.lengths(torch.ones(2, 3, 1, dtype=torch.bool), shape=(2, 3), device=torch.device('cpu'))",
    "flow.sample(lambda x, s: x, torch.zeros(2, 7), [1.0])",
    "flow.sample(lambda x, s: x, torch.zeros(1, 7, 32, dtype=torch.long), [1.0])",
])  # fmt: skip
def test_a_wrong_shape_or_dtype_is_seen(call):
    done = run(WRONG.format(call=call))
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr or "BeartypeCallHint" in done.stderr, done.stderr[-2000:]
