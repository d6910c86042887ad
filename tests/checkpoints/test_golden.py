"""Every checkpoint that openpi, LeRobot and Orbax wrote opens, with the dimensions and values that it has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_cases import POLICIES, open_case
from vivace.checkpoints.names import expected_shapes
from vivace.checkpoints.open import open_checkpoint
from vivace.errors import CheckpointError

CPU = torch.device("cpu")
ORIGINS = {"lerobot": "lerobot", "openpi_pytorch": "openpi_torch", "openpi_jax": "openpi_jax"}


def load(golden_dir: Path, name: str):
    return open_case(golden_dir / name)


def test_the_list_is_complete(golden_dir):
    assert sorted(POLICIES) == sorted(path.parent.name for path in golden_dir.glob("*/checkpoint"))


@pytest.mark.parametrize("name", POLICIES)
def test_dimensions_equal_those_of_the_case(golden_dir, name):
    case, checkpoint = load(golden_dir, name)
    model = checkpoint.model
    assert {
        "vlm_width": model.prefix.width,
        "expert_width": model.expert.width,
        "depth": model.prefix.layers,
        "vlm_mlp": model.prefix.mlp_width,
        "expert_mlp": model.expert.mlp_width,
        "vision_width": model.vision.width,
        "vision_layers": model.vision.layers,
        "vision_mlp": model.vision.mlp_width,
        "vocab": model.vocab_size,
    } == case["dims"]
    assert {
        "num_heads": model.prefix.num_heads,
        "num_kv_heads": model.prefix.num_kv_heads,
        "head_dim": model.prefix.head_dim,
        "vision_heads": model.vision.num_heads,
        "patch_size": model.vision.patch_size,
        "image_size": model.vision.image_size,
    } == case["not_inferable"]
    assert model.kind == case["model"]
    assert model.action_width == case["action_dim_padded"]
    assert checkpoint.origin == next(ours for start, ours in ORIGINS.items() if name.startswith(start))
    if checkpoint.origin != "openpi_jax":  # the JAX folder has no horizon
        assert model.horizon == case["horizon"]
        assert model.declared_dtype == case["dtype"]


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_is_complete_and_reads_as_promised(golden_dir, name):
    _, checkpoint = load(golden_dir, name)
    assert {key: ref.shape for key, ref in checkpoint.tensors.items()} == expected_shapes(checkpoint.model)
    for ref in checkpoint.tensors.values():
        tensor = ref.read(CPU)
        assert tuple(tensor.shape) == ref.shape
        assert tensor.dtype == ref.dtype
        assert tensor.is_contiguous()


@pytest.mark.parametrize("name", [name for name in POLICIES if "jax" not in name])
def test_values_are_those_that_the_safetensors_library_reads(golden_dir, name):
    case, checkpoint = load(golden_dir, name)
    stored = load_file(golden_dir / name / "checkpoint" / "model.safetensors")
    stored = {key.removeprefix("model."): tensor for key, tensor in stored.items()}
    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
    text = "paligemma_with_expert.paligemma.model.language_model"
    expert = "paligemma_with_expert.gemma_expert.model"
    embedding = f"{text}.embed_tokens.weight"
    pairs = {
        "vision.patch.weight": f"{tower}.embeddings.patch_embedding.weight",
        "vision.position.weight": f"{tower}.embeddings.position_embedding.weight",
        "vision.layers.0.norm2.bias": f"{tower}.encoder.layers.0.layer_norm2.bias",
        "vision.layers.0.attn.o.weight": f"{tower}.encoder.layers.0.self_attn.out_proj.weight",
        "vision.layers.0.mlp.fc2.weight": f"{tower}.encoder.layers.0.mlp.fc2.weight",
        "projector.weight": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight",
        "embedding.weight": embedding if embedding in stored else "paligemma_with_expert.paligemma.lm_head.weight",
        "prefix.layers.1.norm1.weight": f"{text}.layers.1.input_layernorm.weight",
        "prefix.layers.1.norm2.weight": f"{text}.layers.1.post_attention_layernorm.weight",
        "prefix.layers.0.attn.v.weight": f"{text}.layers.0.self_attn.v_proj.weight",
        "prefix.layers.1.mlp.up.weight": f"{text}.layers.1.mlp.up_proj.weight",
        "expert.layers.1.attn.k.weight": f"{expert}.layers.1.self_attn.k_proj.weight",
        "expert.layers.0.mlp.gate.weight": f"{expert}.layers.0.mlp.gate_proj.weight",
        "action_out.bias": "action_out_proj.bias",
    }
    if case["model"] == "pi05":
        pairs["expert.layers.1.norm2.modulation.bias"] = f"{expert}.layers.1.post_attention_layernorm.dense.bias"
        pairs["expert.norm.modulation.weight"] = f"{expert}.norm.dense.weight"
        pairs["time_out.weight"] = "time_mlp_out.weight"
    else:
        pairs["expert.norm.weight"] = f"{expert}.norm.weight"
        pairs["action_time_in.weight"] = "action_time_mlp_in.weight"
    for ours, theirs in pairs.items():
        assert torch.equal(checkpoint.tensors[ours].read(CPU), stored[theirs]), (ours, theirs)


def test_embed_tokens_wins_over_lm_head(golden_dir):
    _, checkpoint = load(golden_dir, "lerobot_pi05_fp32")
    stored = load_file(golden_dir / "lerobot_pi05_fp32" / "checkpoint" / "model.safetensors")
    lm_head = stored["model.paligemma_with_expert.paligemma.lm_head.weight"]
    embedding = checkpoint.tensors["embedding.weight"].read(CPU)
    assert not torch.equal(embedding, lm_head)  # the two differ in this file, so taking the wrong one shows
    assert "model.paligemma_with_expert.paligemma.lm_head.weight" in checkpoint.dead


def test_vision_heads_must_be_told_where_the_width_does_not_say(golden_dir):
    with pytest.raises(CheckpointError, match="vision_heads"):
        open_checkpoint(golden_dir / "openpi_pytorch_pi05_fp32" / "checkpoint")


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith("lerobot")])
def test_robot_facts_of_lerobot(golden_dir, name):
    case, checkpoint = load(golden_dir, name)
    robot, config = checkpoint.robot, json.loads((golden_dir / name / "checkpoint" / "config.json").read_text())
    assert (robot.state_dim, robot.action_dim) == (case["state_dim"], case["action_dim"])
    assert robot.cameras == tuple(key for key, value in config["input_features"].items() if value["type"] == "VISUAL")
    assert robot.state_mode == case["normalization"]["state"].lower()
    assert robot.action_mode == case["normalization"]["action"].lower()
    assert robot.max_prompt_tokens == case["max_token_len"]
    assert robot.image_pad == case.get("image_pad_before_scaling", 0.0)
    assert robot.pad_state_to == case.get("pad_state_before_discretise", 0)
    assert (robot.prompt == "lerobot04_pi05") == (name == "lerobot04_pi05_fp32")
    file = next((golden_dir / name / "checkpoint").glob("policy_preprocessor_step_*.safetensors"))
    for vector, stats in zip(("observation.state", "action"), robot.stats[""], strict=True):
        for key in ("mean", "std", "q01", "q99", "q10", "q90", "min", "max"):
            stored = load_file(file).get(f"{vector}.{key}")
            ours = getattr(stats, key)
            assert (stored is None) == (ours is None), key
            if stored is not None:
                assert ours.dtype == np.float64
                assert np.array_equal(ours, stored.double().numpy())


def test_relative_actions_rtc_and_tokenizer_of_lerobot(golden_dir):
    _, relative = load(golden_dir, "lerobot_pi0_relative_fp32")
    assert relative.robot.relative_mask == (True, True, True, True, True, False)
    _, guided = load(golden_dir, "lerobot_pi05_rtc_guided")
    assert guided.rtc is not None
    assert (guided.rtc.mode, guided.rtc.schedule, guided.rtc.execution_horizon) == ("guided", "EXP", 10)
    _, trained = load(golden_dir, "lerobot_pi05_rtc_trained")
    assert trained.rtc is not None
    assert (trained.rtc.mode, trained.rtc.training_max_delay, trained.rtc.execution_horizon) == ("trained", 4, 6)
    assert trained.robot.tokenizer_dir == trained.path / "tokenizer"
    assert guided.robot.tokenizer_dir is None
    assert guided.num_denoise_steps == 10


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith("openpi")])
def test_robot_facts_of_openpi(golden_dir, name):
    case, checkpoint = load(golden_dir, name)
    asset = case["embodiment"]["asset_id"]
    assert list(checkpoint.robot.stats) == [asset]
    file = golden_dir / name / "checkpoint" / "assets" / asset / "norm_stats.json"
    table = json.loads(file.read_text())["norm_stats"]
    for vector, stats in zip(("state", "actions"), checkpoint.robot.stats[asset], strict=True):
        for key in ("mean", "std", "q01", "q99"):
            ours, theirs = getattr(stats, key), table[vector].get(key)
            assert (ours is None) if theirs is None else np.array_equal(ours, np.array(theirs))
    pi05 = case["model"] == "pi05"
    assert checkpoint.robot.state_mode == ("quantiles" if pi05 else "mean_std")
    assert checkpoint.robot.prompt == ("openpi_pi05" if pi05 else "openpi_pi0")
    assert checkpoint.robot.eps == 1e-6


def test_numerics_follow_the_origin(golden_dir):
    seen = {
        name: load(golden_dir, name)[1].model
        for name in ("lerobot_pi05_bf16", "openpi_jax_pi05", "openpi_pytorch_pi0_fp32")
    }
    facts = {name: (m.time_grid, m.time_embedding, m.declared_dtype, m.flavour) for name, m in seen.items()}
    assert facts == {
        "lerobot_pi05_bf16": ("direct", "float64", "bfloat16", "lerobot"),
        "openpi_jax_pi05": ("accumulated", "float32", "bfloat16", "openpi_jax"),
        "openpi_pytorch_pi0_fp32": ("accumulated", "float64", "float32", "openpi_torch"),
    }


def test_the_version_guess_is_noted_and_can_be_overridden(golden_dir):
    folder = golden_dir / "lerobot04_pi05_fp32" / "checkpoint"
    guessed = open_checkpoint(folder, vision_heads=4)
    assert any("LeRobot 0.4" in note for note in guessed.notes)
    assert "lerobot_version" in guessed.guesses
    told = open_checkpoint(folder, vision_heads=4, lerobot_version="0.6")
    assert (told.robot.image_pad, told.robot.pad_state_to, told.robot.prompt) == (0.0, 0, "lerobot_pi05")
    assert "lerobot_version" not in told.guesses
