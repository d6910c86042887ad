"""LeRobot's own loader, processors and network on folders that vivace wrote. Needs lerobot, which CI lacks.

How it is asked, and which three places of it are told our sizes: lerobot_side.py. The sizes as they stand in its source are
compared tensor by tensor, without memory. How to run this: docs/guides/training.md.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.checkpoints.open import open_checkpoint

pytest.importorskip("lerobot", reason="lerobot is not installed; docs/guides/training.md says how to run this")
sys.path.insert(0, str(Path(__file__).parent))
lerobot_names = importlib.import_module("lerobot_names")
lerobot_side = importlib.import_module("lerobot_side")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """`compared(case)`: what `lerobot_side.compare` found, once per case."""
    found: dict[str, dict] = {}

    def get(case: str) -> dict:
        if case not in found:
            folder = tmp_path_factory.mktemp("lerobot") / "policy"
            lerobot_side.FOLDERS[case](folder)
            found[case] = lerobot_side.compare(folder)
        return found[case]

    return get


def test_the_names_in_the_file_are_those_of_this_lerobot():
    for kind in ("pi0", "pi05"):
        assert lerobot_names.stored(kind) == lerobot_names.built(kind)


@pytest.mark.parametrize("case", lerobot_side.FOLDERS)
def test_its_loader_takes_the_folder(compared, case):
    """All names required, none left over, and every value that of the file."""
    found = compared(case)
    assert found["all_keys_loaded"]
    assert found["missing"] == found["unexpected"] == []
    assert found["equal_tensors"] == found["tensors"] > 0


@pytest.mark.parametrize("case", lerobot_side.FOLDERS)
def test_its_actions_are_ours(compared, case, capsys):
    """Raw observation to robot actions on both sides."""
    found = compared(case)
    with capsys.disabled():
        print(f"\n{case}: max abs {found['max_abs']:.2e} of {found['scale']:.2f}, relative L2 {found['rel_l2']:.2e}")
    assert found["dtype"] == ("bfloat16" if "bfloat16" in case else "float32")
    if found["dtype"] == "float32":
        assert found["max_abs"] < 5e-5, "the tolerance of LeRobot's own float32 fixtures"
    else:
        assert found["rel_l2"] < 2e-3
    assert found["noise_matters"] > 0.01


def test_a_tensor_too_few_is_noticed(tmp_path):
    """What the loader says when a name is missing: the check above can fail."""
    make_checkpoint(tmp_path / "policy", Recipe())
    model = open_checkpoint(tmp_path / "policy").model
    taller = replace(model, vision=replace(model.vision, layers=model.vision.layers + 1))
    with lerobot_side.told_our_sizes(taller) as policy_class:
        _, said = lerobot_side.loaded(policy_class, tmp_path / "policy")
    assert "Warning: Could not load state dict" in said
    assert "All keys loaded" not in said
