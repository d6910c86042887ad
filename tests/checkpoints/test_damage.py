"""Damaged, foreign and incomplete checkpoints: a CheckpointError that names what is wrong, never a half-loaded network."""

from __future__ import annotations

import json
import random
import shutil
import time

import pytest
import torch

from vivace.checkpoints.open import open_checkpoint
from vivace.checkpoints.source import check_finite
from vivace.errors import CheckpointError, ConfigError, Unsupported, VivaceError

CPU = torch.device("cpu")
EXPERT = "paligemma_with_expert.gemma_expert.model"
TEXT = "paligemma_with_expert.paligemma.model.language_model"


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made(format="openpi"), tmp_path / "copy")
    return tmp_path / "copy"


def refuse(folder, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def read_all(checkpoint) -> None:
    for ref in checkpoint.tensors.values():
        check_finite(ref, ref.read(CPU))


def without(*keys: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


@pytest.mark.parametrize("keep", [0, 7, 8, 300, 9_000, -1])
def test_truncated(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(folder, "damaged|truncated")


def test_trailing_bytes(folder):
    with (folder / "model.safetensors").open("ab") as handle:
        handle.write(b"more")
    refuse(folder, "truncated or damaged")


def test_truncated_after_opening(folder):
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # its end is of tensors that nothing reads
    with pytest.raises(CheckpointError, match="ended inside tensor"):
        read_all(checkpoint)


def test_missing_tensors_are_all_listed(rewritten):
    gone = (f"{TEXT}.layers.1.mlp.up_proj.weight", f"{EXPERT}.layers.0.self_attn.q_proj.weight", "time_mlp_out.bias")
    message = refuse(rewritten(without(*gone), format="openpi"), "3 missing")
    for name in ("prefix.layers.1.mlp.up.weight", "expert.layers.0.attn.q.weight", "time_out.bias"):
        assert name in message


def test_a_missing_layer_of_one_expert(rewritten):
    def drop(tensors):
        return {key: value for key, value in tensors.items() if f"{EXPERT}.layers.1." not in key}

    assert "expert.layers.1.mlp.down.weight" in refuse(rewritten(drop, format="openpi"), "9 missing|11 missing")


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (f"{TEXT}.layers.0.mlp.down_proj.weight", r"got \[64, 32\], wanted \[32, 64\], transposed\?"),
        (f"{EXPERT}.layers.1.self_attn.k_proj.weight", r"got \[24, 16\], wanted \[16, 24\], transposed\?"),
        ("action_in_proj.weight", r"got \[32, 24\], wanted \[24, 32\], transposed\?"),
        (f"{EXPERT}.norm.dense.weight", r"got \[24, 72\], wanted \[72, 24\], transposed\?"),
    ],
)
def test_a_transposed_tensor_is_the_one_that_is_named(rewritten, key, shown):
    folder = rewritten(lambda tensors: {**tensors, key: tensors[key].T}, format="openpi")
    message = refuse(folder, shown)
    assert message.count("wanted [") == 1, message  # the others are not blamed


@pytest.mark.parametrize("layer", [0, 1])
def test_a_tensor_of_another_width(rewritten, layer):
    key = f"{TEXT}.layers.{layer}.self_attn.q_proj.weight"
    refuse(rewritten(lambda tensors: {**tensors, key: torch.zeros(128, 40)}, format="openpi"), r"got \[128, 40\]")


def test_integers_and_empty_tensors(rewritten):
    bias = "action_out_proj.bias"
    refuse(rewritten(lambda t: {**t, bias: torch.zeros(32, dtype=torch.int32)}, format="openpi"), r"torch\.int32")
    refuse(rewritten(lambda t: {**t, bias: torch.zeros(0)}, format="openpi"), r"got \[0\]")
    refuse(rewritten(lambda t: {**t, bias: torch.zeros(())}, format="openpi"), r"got \[\]")


def test_renamed_tensors(rewritten):
    folder = rewritten(lambda t: {key.replace("gate_proj", "w1"): value for key, value in t.items()}, format="openpi")
    assert "w1.weight" in refuse(folder, "does not know")


def test_other_architectures(rewritten):
    refuse(
        rewritten(lambda t: {"transformer.h.0.attn.weight": torch.zeros(4, 4)}, format="openpi"), "not a pi0 or pi0.5"
    )
    only_vlm = rewritten(lambda t: {k: v for k, v in t.items() if "paligemma." in k}, format="openpi")
    refuse(only_vlm, "neither pi0 nor pi0.5")


def test_pi0_and_pi05_mixed(rewritten):
    folder = rewritten(lambda t: {**t, "state_proj.bias": torch.zeros(24)}, format="openpi")
    assert "state.bias" in refuse(folder, "both pi0 and pi0.5")
    renamed = rewritten(
        lambda t: {key.replace("time_mlp", "action_time_mlp"): value for key, value in t.items()}, format="openpi"
    )
    refuse(renamed, "both pi0 and pi0.5")  # LeRobot renames one into the other without looking


def test_config_that_contradicts_the_weights(made, tmp_path):
    def changed(name, **fields):
        target = tmp_path / name
        shutil.copytree(made(format="lerobot"), target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, **fields}))
        return target

    refuse(changed("kind", type="pi0"), "contradicts the weights")
    refuse(changed("other", type="act"), "another policy")
    refuse(changed("width", max_action_dim=16), "contradicts the weights")
    refuse(changed("pixels", image_resolution=[448, 448]), "contradicts the weights")
    refuse(changed("dtype", dtype="int8"), "float32 or bfloat16")
    refuse(changed("chunk", chunk_size="many"), "chunk_size")
    refuse(changed("rtc", rtc_config={"mode": "magic"}), "rtc_config")
    with pytest.raises(Unsupported, match="use_visual_memory"):
        open_checkpoint(changed("memory", use_visual_memory=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(rewritten, value):
    key = f"{EXPERT}.layers.1.mlp.up_proj.weight"

    def poison(tensors):
        tensors[key][3, 5] = value
        return tensors

    checkpoint = open_checkpoint(rewritten(poison, format="openpi"))
    with pytest.raises(CheckpointError, match="not finite") as caught:
        read_all(checkpoint)
    assert key in str(caught.value)
    assert f"flat index {3 * 24 + 5}" in str(caught.value)


def test_folders_that_are_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "google/paligemma"):
        with pytest.raises(CheckpointError, match=r"no checkpoint|not a checkpoint"):
            open_checkpoint(path)
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.ocdbt"):
        open_checkpoint(tmp_path)


def test_adapters_and_old_normalisation_buffers_say_the_way_out(tmp_path, rewritten):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refuse(tmp_path, "merge_and_unload")
    lora = rewritten(lambda t: {**t, "action_in_proj.lora_A.weight": torch.zeros(4, 4)}, format="openpi")
    refuse(lora, "merge_and_unload")
    buffers = {"normalize_inputs.buffer_observation_state.mean": torch.zeros(8)}
    refuse(rewritten(lambda t: {**t, **buffers}, format="openpi"), "migrate_policy_normalization")


def test_arguments_are_checked(folder):
    for wrong in ({"horizon": 0}, {"vision_heads": -1}, {"lerobot_version": "0.7"}):
        with pytest.raises(ConfigError):
            open_checkpoint(folder, **wrong)
    with pytest.raises(CheckpointError, match="num_heads"):
        open_checkpoint(folder, num_heads=7)
    with pytest.raises(CheckpointError, match="vision heads"):
        open_checkpoint(folder, vision_heads=5)
    with pytest.raises(ConfigError, match="horizon 3; wanted 50"):
        open_checkpoint(folder, horizon=3)
    assert open_checkpoint(folder, horizon=50).model.horizon == 50
    split = open_checkpoint(folder, num_heads=16, head_dim=8).model.prefix
    assert (split.num_heads, split.num_kv_heads, split.head_dim) == (16, 2, 8)


def corrupt(header: bytes, rng: random.Random) -> bytes:
    """One random damage of a header: bytes, structure, or a number that a reader might trust."""
    if rng.random() < 0.4:
        damaged = bytearray(header)
        for _ in range(rng.choice((1, 1, 3, 20))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged)
    table = json.loads(header)
    key = rng.choice([key for key in table if key != "__metadata__"])
    entry = table[key]
    other = rng.choice([key for key in table if key != "__metadata__"])
    action = rng.randrange(12)
    if action == 0:
        entry["shape"] = rng.choice(
            [[], [2**62, 2**62], [-1], [1.5], "many", None, [[1]], [0] * 9, [True], entry["shape"][::-1]]
        )
    elif action == 1:
        entry["data_offsets"] = rng.choice(
            [[0, 0], [5, 1], [0, 2**63], [-8, 8], [0], None, [0, "9"], table[other]["data_offsets"]]
        )
    elif action == 2:
        entry["dtype"] = rng.choice(["F32", "I32", "F64", "BF16", "F8_E4M3", "", None, 7, {"a": 1}])
    elif action == 3:
        table[rng.choice(["", "model.", "x" * 5000, f"{key}.layers.{'9' * 5000}.", "\u0000"])] = entry
    elif action == 4:
        del table[key]
    elif action == 5:
        table[key] = rng.choice([None, [], 3, "tensor", {}])
    elif action == 6:
        table["__metadata__"] = rng.choice([None, [], {"a": 1}, "text", {key: other}, {"x": key}])
    elif action == 7:
        table[key], table[other] = table[other], table[key]
    elif action == 8:
        return json.dumps(table).encode()[: rng.randrange(len(header))]
    elif action == 9:
        return b"[" * rng.choice((10, 100_000)) + header
    elif action == 10:
        return json.dumps(table).replace(json.dumps(other), json.dumps(key)).encode()
    else:
        table[key.replace("layers.1", f"layers.{rng.choice((2, 511, 10**9))}")] = table.pop(key)
    return json.dumps(table).encode()


def test_a_thousand_corrupted_headers(folder):
    """Each opens cleanly (the damage was harmless, or another valid header) or is a CheckpointError; none hangs."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    rng = random.Random(20240611)
    outcomes = {"opened": 0, "refused": 0}
    start, longest = time.monotonic(), 0
    for number in range(1000):
        new = corrupt(header, rng)
        claimed = (
            len(new) if rng.random() < 0.9 else rng.choice([0, 1, len(new) - 1, len(new) + 8, 2**31, 2**63, 2**64 - 1])
        )
        file.write_bytes(claimed.to_bytes(8, "little") + new + data)
        began = time.monotonic()
        try:
            checkpoint = open_checkpoint(folder)
            for ref in list(checkpoint.tensors.values())[:5]:
                assert tuple(ref.read(CPU).shape) == ref.shape
            outcomes["opened"] += 1
        except CheckpointError as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
        assert time.monotonic() - began < 5, f"case {number} hung"
    assert time.monotonic() - start < 60
    assert longest < 60_000
    assert outcomes["refused"] > 900, outcomes


ODD = (None, True, -1, 0, 1.5, float("inf"), "text", "", [], [None], ["a"], {}, {"a": None}, [[1]], 10**30)


def spoil(table, rng: random.Random):
    """Replace one value somewhere in a JSON document by something of an odd type."""
    node, key = {"root": table}, "root"
    while isinstance(node[key], dict | list) and node[key] and (node[key] is table or rng.random() < 0.8):
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    node[key] = rng.choice(ODD)
    return table


@pytest.mark.parametrize("source", ["lerobot", "openpi", "golden"])
def test_corrupted_settings_files(made, tmp_path, request, source):
    """Any bytes and any types in the JSON files: VivaceError or a clean opening, no other exception."""
    folder = tmp_path / "copy"
    if source == "golden":  # relative actions and more
        shutil.copytree(request.getfixturevalue("golden_dir") / "lerobot_pi0_relative_fp32" / "checkpoint", folder)
    else:
        shutil.copytree(made(format=source), folder)
    rng = random.Random(7)
    names = sorted(file for file in folder.rglob("*.json"))
    assert names
    for file in names:
        good = file.read_bytes()
        for round_number in range(200):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 2, 10))):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            odd = round_number % 4
            file.write_bytes(json.dumps(spoil(json.loads(good), rng)).encode() if odd else bytes(bad))
            try:
                open_checkpoint(folder, vision_heads=2)
            except VivaceError:
                continue
        file.write_bytes(good)
    open_checkpoint(folder, vision_heads=2)
