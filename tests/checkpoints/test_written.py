"""What a written folder holds is what the originals' own loaders ask for: every name, every shape, no field of ours."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vivace.checkpoints.folder import OWN_SETTINGS
from vivace.checkpoints.names import template_of
from vivace.checkpoints.open import open_checkpoint
from vivace.checkpoints.sizes import network
from vivace.checkpoints.written import EMBEDDING, EXPERT_HEAD, LM_HEAD, PREFIX_NORM, written
from vivace.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))
import lerobot_names

CASES = {
    ("lerobot", "pi05"): "lerobot_pi05_fp32",
    ("lerobot", "pi0"): "lerobot_pi0_fp32",
    ("openpi", "pi05"): "openpi_pytorch_pi05_fp32",
    ("openpi", "pi0"): "openpi_pytorch_pi0_fp32",
}
SIDE_FILES = ("policy_preprocessor.json", "policy_postprocessor.json")


@pytest.mark.parametrize(("kind", "count"), [("pi0", 778), ("pi05", 813)])
def test_full_size_is_lerobots_own_network_tensor_by_tensor(kind, count):
    """Against LeRobot 0.6.1's unmodified network (lerobot_names.json): nothing missing, nothing more, no other shape."""
    theirs = lerobot_names.stored(kind)
    ours = {key: item.shape for key, item in written(network("full", kind, horizon=50), format="lerobot").items()}
    assert len(theirs) == count
    assert ours == theirs


@pytest.mark.parametrize(("fmt", "kind"), CASES)
def test_names_and_dtypes_are_those_of_a_folder_that_the_original_wrote(made, golden_dir, fmt, kind):
    def layout(file):
        with safe_open(file, "pt") as opened:
            dtypes = {template_of(key): opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
            return dtypes, opened.metadata()

    theirs, aliases = layout(golden_dir / CASES[fmt, kind] / "checkpoint" / "model.safetensors")
    ours, metadata = layout(made(format=fmt, kind=kind) / "model.safetensors")
    assert ours == theirs
    assert metadata == (aliases or {"format": "pt"}), "openpi's loader reads there which tensors are one"


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_lerobots_settings_have_no_field_that_lerobot_lacks(made, golden_dir, kind):
    """Its parser ends with an error at any other field."""
    ours, theirs = made(format="lerobot", kind=kind), golden_dir / CASES["lerobot", kind] / "checkpoint"
    config = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert config[0].keys() - config[1].keys() == set()
    for name in SIDE_FILES:
        steps = [json.loads((folder / name).read_text())["steps"] for folder in (ours, theirs)]
        assert [step["registry_name"] for step in steps[0]] == [step["registry_name"] for step in steps[1]]
        for mine, original in zip(*steps, strict=True):
            assert mine.keys() == original.keys()
            assert mine["config"].keys() == original["config"].keys()
            assert mine.get("state_file") == original.get("state_file")
            if "state_file" in mine:
                needed = {f"{name}.{key}" for name in ("observation.state", "action") for key in ("q01", "q99", "mean")}
                assert needed <= load_file(ours / mine["state_file"]).keys()


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_heads_that_nothing_reads(made, kind):
    """LeRobot copies the prefix's head over the table while it loads, so the two must be equal."""
    tensors = load_file(made(format="lerobot", kind=kind) / "model.safetensors")
    assert torch.equal(tensors["model." + LM_HEAD], tensors["model." + EMBEDDING])
    assert tensors["model." + EXPERT_HEAD].shape == (512, 24)
    assert not tensors["model." + EXPERT_HEAD].any()
    assert not tensors["model." + PREFIX_NORM].any()
    tensors = load_file(made(format="openpi", kind=kind) / "model.safetensors")
    assert EMBEDDING not in tensors
    assert tensors[LM_HEAD].any()
    assert not tensors[EXPERT_HEAD].any()


def test_progress_counts_what_inference_reads_once(made, tmp_path):
    from vivace.checkpoints.make import Recipe, make_checkpoint

    for fmt in ("lerobot", "openpi"):
        counts: list[int] = []
        recipe = Recipe(format=fmt, tokenizer=False)
        make_checkpoint(tmp_path / fmt, recipe, progress=counts.append)
        assert sum(counts) == recipe.parameters()


def edited(made, tmp_path, *, config=None, own=None):
    """A copy of a LeRobot folder with fields added to config.json, and vivace.json as given (None = removed)."""
    target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
    shutil.copytree(made(format="lerobot"), target)
    table = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**table, **(config or {})}))
    (target / OWN_SETTINGS).unlink()
    if own is not None:
        (target / OWN_SETTINGS).write_text(json.dumps(own))
    return target


def test_settings_of_ours_are_read_from_vivace_json_or_an_older_config_json(made, tmp_path):
    heads, delay = "vision_num_attention_heads", "rtc_training_max_delay"
    new = open_checkpoint(edited(made, tmp_path, own={heads: 3, delay: 5}))
    old = open_checkpoint(edited(made, tmp_path, config={heads: 3, delay: 5}))
    both = open_checkpoint(edited(made, tmp_path, config={heads: 3}, own={heads: 2, delay: 5}))
    for checkpoint in (new, old, both):
        assert checkpoint.model.vision.num_heads == 3
        assert checkpoint.rtc is not None
        assert (checkpoint.rtc.training_max_delay, checkpoint.rtc.enabled) == (5, False)
    with pytest.raises(CheckpointError, match=r"number of vision heads.*vivace\.json"):
        open_checkpoint(edited(made, tmp_path))
    for value in (-1, "4", "", True, False, 1.5, new.model.horizon, 8000):
        for place in ("own", "config"):
            folder = edited(made, tmp_path, **{"own": {heads: 2}, place: {heads: 2, delay: value}})
            name = {"own": r"vivace\.json", "config": r"config\.json"}[place]
            with pytest.raises(CheckpointError, match=rf"{name}: {delay} cannot be used"):
                open_checkpoint(folder)
    last = new.model.horizon - 1
    allowed = {value: open_checkpoint(edited(made, tmp_path, own={heads: 2, delay: value})).rtc for value in (0, last)}
    assert allowed[0] is None
    assert allowed[last].training_max_delay == last


def test_an_unknown_key_of_vivace_json_is_refused(made, tmp_path):
    """A mistyped one would be no setting at all: a network trained for delays would be said to be trained for none."""
    heads, delay = "vision_num_attention_heads", "rtc_training_max_delay"
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(edited(made, tmp_path, own={heads: 2, "rtc_training_max_dela": 8}))
    for part in (
        "vivace.json has an unknown key",
        "'rtc_training_max_dela'",
        f"['{delay}', '{heads}']",
        f"mean '{delay}'",
    ):
        assert part in str(refused.value)
    with pytest.raises(CheckpointError, match="unknown key") as refused:
        open_checkpoint(edited(made, tmp_path, config={heads: 2, delay: 4}, own={"colour": 1}))
    assert "did you mean" not in str(refused.value)
