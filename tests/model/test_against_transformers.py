"""Hugging Face's own modules as an independent oracle: SigLIP, projector, prefix keys and values, and the whole of pi0.

Their pi0 has no adaptive norms, so pi0.5's expert has no oracle here (the golden fixtures and the literal formula cover
it); its prefix is compared. Their time embedding is float32, hence 1e-4 on the actions (pi05.md section 5.4).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny import build, random_tensors

from vivace.backends import eager
from vivace.checkpoints.open import open_checkpoint
from vivace.config import EngineConfig
from vivace.types import ModelInputs, Trace

transformers = pytest.importorskip("transformers")
H, L, VOCAB, IMAGE_TOKEN = 6, 5, 90, 89


@pytest.fixture(scope="module")
def oracle():
    gemma = {
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_hidden_layers": 3,
    }
    config = transformers.PI0Config(
        chunk_size=H,
        vlm_config={
            "model_type": "paligemma", "projection_dim": 32, "image_token_id": IMAGE_TOKEN,
            "text_config": {**gemma, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB},
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 2, "patch_size": 14, "image_size": 56, "vision_use_head": False,
            },
        },
        dit_config={**gemma, "hidden_size": 16, "intermediate_size": 28},
    )  # fmt: skip
    model = transformers.PI0ForConditionalGeneration(config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.8 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=g) * scale)
            if "layer_norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


@pytest.fixture(scope="module")
def checkpoint(oracle, tmp_path_factory):
    """Saved under Hugging Face's key names: the loader must know that dialect."""
    folder = tmp_path_factory.mktemp("hf_pi0")
    state = {name: value.clone().contiguous() for name, value in oracle.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"action_dim": 32, "action_horizon": H, "precision": "float32"}))
    return open_checkpoint(folder, vision_heads=2)


@pytest.fixture(scope="module")
def request_inputs():
    g = torch.Generator().manual_seed(4)
    images = torch.rand(1, 2, 3, 56, 56, generator=g) * 2 - 1
    tokens = torch.randint(0, IMAGE_TOKEN, (1, L), generator=g)
    return ModelInputs(images, tokens, state=torch.randn(1, 32, generator=g)), torch.randn(1, H, 32, generator=g)


def theirs(inputs):
    """The same request in their form: image placeholder tokens in front of the prompt."""
    placeholders = torch.full((1, 2 * 16), IMAGE_TOKEN)
    ids = torch.cat([placeholders, inputs.tokens], dim=1)
    return {
        "input_ids": ids, "pixel_values": inputs.images, "attention_mask": torch.ones_like(ids),
        "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool),
    }  # fmt: skip


def ours(config, checkpoint_tensors, inputs, noise, steps=10):
    tensors = {name: ref.read(torch.device("cpu")) for name, ref in checkpoint_tensors.items()}
    backend = eager.create(build(config, tensors), EngineConfig(num_denoise_steps=steps))
    trace = Trace()
    cache = backend.prefill(inputs, trace=trace)
    return backend.denoise(cache, noise), cache, trace


def test_whole_pi0_chunk(oracle, checkpoint, request_inputs):
    inputs, noise = request_inputs
    config = replace(checkpoint.model, time_grid="direct")
    assert (config.kind, config.vision.num_heads, config.prefix.head_dim) == ("pi0", 2, 16)
    expected = oracle.sample_actions(state=inputs.state, noise=noise, **theirs(inputs))
    actions, *_ = ours(config, checkpoint.tensors, inputs, noise)
    assert float((actions - expected).abs().max() / expected.abs().max()) < 1e-4
    # with their float32 time embedding the agreement is that of rounding
    exact, *_ = ours(replace(config, time_embedding="float32"), checkpoint.tensors, inputs, noise)
    assert float((exact - expected).abs().max() / expected.abs().max()) < 1e-5
    # control: another schedule is another policy
    other, *_ = ours(config, checkpoint.tensors, inputs, noise, steps=9)
    assert float((other - expected).abs().max() / expected.abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_vision_tokens_and_prefix_keys_and_values(oracle, checkpoint, request_inputs, kind):
    inputs, noise = request_inputs
    config = replace(checkpoint.model, kind=kind)
    tensors = dict(checkpoint.tensors)
    if kind == "pi05":
        from tiny import InMemory

        prefix = ("vision.", "projector.", "embedding.", "prefix.")
        random = {n: InMemory(t) for n, t in random_tensors(config).items() if not n.startswith(prefix)}
        tensors = {n: ref for n, ref in tensors.items() if n.startswith(prefix)} | random
    _, cache, trace = ours(config, tensors, inputs, noise)
    with torch.no_grad():
        told = theirs(inputs)
        embeds = oracle.model.embed_prefix(told["input_ids"], told["pixel_values"], told["pixel_attention_mask"])
        mask = told["attention_mask"]
        past = oracle.model.vlm(
            inputs_embeds=embeds, attention_mask=mask, position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(mask), use_cache=True,
        ).cache  # fmt: skip
    S = embeds.shape[1]
    assert (trace.prefix_embeds - embeds).abs().max() < 1e-5
    for layer in range(config.prefix.layers):
        k, v = past.layers[layer].keys, past.layers[layer].values
        assert (cache.k[layer][:, :S] - k.transpose(1, 2)).abs().max() < 1e-5, f"K of layer {layer}"
        assert (cache.v[layer][:, :S] - v.transpose(1, 2)).abs().max() < 1e-5, f"V of layer {layer}"
