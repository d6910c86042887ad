"""Every key dialect of the same network gives the same canonical tensors; what is unknown is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from vivace.checkpoints.names import expected_shapes
from vivace.checkpoints.open import open_checkpoint
from vivace.errors import CheckpointError

CPU = torch.device("cpu")
TEXT = "paligemma_with_expert.paligemma.model.language_model"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBED = f"{TEXT}.embed_tokens.weight"


def renamed(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def change(key: str) -> str:
        for pattern, replacement in pairs:
            key = re.sub(pattern, replacement, key)
        return key

    return change


DIALECTS = {
    "as openpi": renamed(),
    "leading model.": renamed(("^", "model.")),
    "compiled": renamed(("^", "model._orig_mod.")),
    "no vision_model": renamed((r"vision_tower\.vision_model\.", "vision_tower.")),
    "embed_tokens": renamed((re.escape(LM_HEAD), EMBED)),
    "before transformers 4.52": renamed(
        (r"paligemma\.lm_head", "paligemma.language_model.lm_head"),
        (r"paligemma\.model\.language_model\.", "paligemma.language_model.model."),
        (r"paligemma\.model\.", "paligemma."),
    ),
    "without the container": renamed((r"^paligemma_with_expert\.", "")),
}
TRANSFORMERS = renamed(
    (re.escape(LM_HEAD), "model.vlm.language_model.embed_tokens.weight"),
    (r"^paligemma_with_expert\.paligemma\.model\.", "model.vlm."),
    (r"vision_tower\.vision_model\.", "vision_tower."),
    (r"^paligemma_with_expert\.gemma_expert\.model\.", "model.dit."),
    (r"^(state_proj|action_in_proj|action_time_mlp)", r"embed_action_time.\1"),
)


def same_tensors(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n].read(CPU), right[n].read(CPU)) for n in left)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_agree(made, rewritten, dialect, kind):
    change = DIALECTS[dialect]
    folder = rewritten(
        lambda tensors: {change(key): value for key, value in tensors.items()}, format="openpi", kind=kind
    )
    want = open_checkpoint(made(format="openpi", kind=kind))
    got = open_checkpoint(folder)
    assert same_tensors(got.tensors, want.tensors)
    assert got.model == want.model


def test_transformers_own_pi0(made, rewritten):
    folder = rewritten(lambda t: {TRANSFORMERS(key): value for key, value in t.items()}, format="openpi", kind="pi0")
    config = {"model_type": "pi0", "chunk_size": 17, "vlm_config": {"vision_config": {"num_attention_heads": 2}}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert same_tensors(checkpoint.tensors, open_checkpoint(made(format="openpi", kind="pi0")).tensors)
    assert checkpoint.origin == "transformers"
    assert (checkpoint.model.horizon, checkpoint.model.time_embedding, checkpoint.model.vision.num_heads) == (
        17,
        "float32",
        2,
    )


def test_transformers_module_names_are_all_known():
    """Keys of the real class, on the meta device: nothing of it is unknown, nothing missing."""
    transformers = pytest.importorskip("transformers")
    from vivace.checkpoints.dialects import DEAD, ROWS, common_form
    from vivace.checkpoints.names import template_of
    from vivace.config import ModelConfig

    with torch.device("meta"):
        state = transformers.PI0ForConditionalGeneration(transformers.PI0Config()).state_dict()
    common = {common_form(key): tuple(value.shape) for key, value in state.items()}
    used = {}
    for key, shape in common.items():
        template = template_of(key)
        if template in DEAD:
            continue
        number = re.search(r"\.layers\.(\d+)\.", key)
        used[ROWS[template].replace("{i}", number[1] if number else "")] = shape
    assert used == expected_shapes(ModelConfig(kind="pi0"))


def test_both_embeddings_stored_and_different(made, rewritten):
    def both(tensors):
        return {**tensors, EMBED: torch.full_like(tensors[LM_HEAD], 7.0)}

    checkpoint = open_checkpoint(rewritten(both, format="openpi"))
    assert bool((checkpoint.tensors["embedding.weight"].read(CPU) == 7.0).all())
    assert LM_HEAD in checkpoint.dead
    assert any("lm_head" in note for note in checkpoint.notes)


def test_tied_aliases_in_the_metadata_are_followed(made, tmp_path):
    """`save_model` keeps one name of tied tensors and writes {other name: kept name} into the metadata."""
    tensors = load_file(made(format="openpi") / "model.safetensors")
    one = tensors.pop(LM_HEAD)
    save_file({**tensors, "kept": one}, tmp_path / "model.safetensors", metadata={EMBED: "kept"})
    with pytest.raises(CheckpointError, match="kept"):  # a kept name must be known as well
        open_checkpoint(tmp_path, vision_heads=2)
    dead = "paligemma_with_expert.gemma_expert.lm_head.weight"
    save_file({**tensors, dead: one}, tmp_path / "model.safetensors", metadata={EMBED: dead, "format": "pt"})
    assert torch.equal(open_checkpoint(tmp_path, vision_heads=2).tensors["embedding.weight"].read(CPU), one)


def test_dead_tensors_are_skipped_and_listed(rewritten):
    dead = {
        "paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(512, 24),
        "paligemma_with_expert.gemma_expert.model.embed_tokens.weight": torch.zeros(512, 24),
        f"{TEXT}.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    checkpoint = open_checkpoint(rewritten(lambda tensors: {**tensors, **dead}, format="openpi"))
    assert set(checkpoint.dead) == {*dead, f"{TEXT}.norm.weight"}


@pytest.mark.parametrize(
    "key",
    [
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.head.probe",
        f"{TEXT}.layers.0.self_attn.q_proj.bias",
        f"{TEXT}.layers.{{i}}.input_layernorm.weight",
        f"{TEXT}.layers.99999999999999999999.input_layernorm.weight",
        "odd{i}",
        "state_proj.scale",
    ],
)
def test_unknown_tensors_are_refused_by_name(rewritten, key):
    folder = rewritten(lambda tensors: {**tensors, key: torch.zeros(2)}, format="openpi")
    with pytest.raises(CheckpointError, match=re.escape(key)):
        open_checkpoint(folder)


def test_two_dialects_of_one_tensor_are_refused(rewritten):
    folder = rewritten(lambda t: {**t, "model.action_in_proj.bias": t["action_in_proj.bias"] + 0}, format="openpi")
    with pytest.raises(CheckpointError, match="claim one place"):
        open_checkpoint(folder)


def test_sharded_weights(made, tmp_path):
    tensors = load_file(made(format="openpi") / "model.safetensors")
    keys = sorted(tensors)
    parts = {"model-1.safetensors": keys[: len(keys) // 2], "model-2.safetensors": keys[len(keys) // 2 :]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, tmp_path / name)
    index = {key: name for name, part in parts.items() for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    got = open_checkpoint(tmp_path, vision_heads=2)
    assert same_tensors(got.tensors, open_checkpoint(made(format="openpi")).tensors)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-2"):
        open_checkpoint(tmp_path, vision_heads=2)
    index["action_in_proj.bias"] = "../model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match="outside"):
        open_checkpoint(tmp_path, vision_heads=2)
