"""Each exact simplification alone, beside the literal computation that it replaces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from literal import Case, Literal
from tiny import InMemory, build, random_tensors, tiny_config

from vivace.model import flow, weights
from vivace.types import ModelInputs

TOLERANCE = 1e-5


@pytest.fixture(params=["pi0", "pi05"])
def subject(request):
    config = tiny_config(request.param)
    tensors = random_tensors(config)
    g = torch.Generator().manual_seed(9)
    case = Case(
        torch.rand(1, 3, 3, 56, 56, generator=g) * 2 - 1, torch.tensor([[True, False, True]]),
        torch.randint(0, 64, (1, 9), generator=g), torch.arange(9)[None] < 6, torch.randn(1, 32, generator=g),
        torch.randn(1, config.horizon, 32, generator=g),
    )  # fmt: skip
    return config, tensors, build(config, tensors), case


def prefill(model, case, *, compact: bool):
    if compact:
        inputs = ModelInputs(case.images[:, case.view_mask[0]], case.tokens[:, case.token_mask[0]], state=case.state)
    else:
        inputs = ModelInputs(case.images, case.tokens, case.view_mask, case.token_mask, case.state)
    embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
    return model.prefill(embeds, mask, state=case.state)


def test_compaction_alone(subject):
    """Keys and values of valid tokens are the same with the padding left in behind a mask, and taken out."""
    _, _, model, case = subject
    short, padded = prefill(model, case, compact=True), prefill(model, case, compact=False)
    assert short.mask is None
    assert torch.equal(short.length, padded.length)
    for a, b in zip((*short.k, *short.v), (*padded.k, *padded.v), strict=True):
        assert (a - b[:, padded.mask[0]]).abs().max() < TOLERANCE


def test_last_prefix_layer_needs_only_its_keys_and_values(subject):
    """Whatever stands in its other weights, the cache stays the same: they are not even loaded."""
    config, tensors, model, case = subject
    garbage = {n: torch.full_like(t, 1e3) if n in weights.dead(config) else t for n, t in tensors.items()}
    before, after = prefill(model, case, compact=True), prefill(build(config, garbage), case, compact=True)
    assert all(torch.equal(a, b) for a, b in zip(before.v, after.v, strict=True))
    literal = Literal(config, garbage).prefix(case)[3]  # runs the whole last layer
    valid = case.view_mask.repeat_interleave(16, 1)[0].tolist() + case.token_mask[0].tolist()
    k = literal[-1][0][:, torch.tensor(valid)]
    assert (after.k[-1][:, : k.shape[1]] - k).abs().max() < TOLERANCE
    used = {n: InMemory(t) for n, t in tensors.items() if n != "prefix.layers.0.attn.q.weight"}
    with pytest.raises(weights.CheckpointError, match="missing"):  # control: a weight that is needed is missed
        weights.load(config, used, device=torch.device("cpu"), dtype_of=lambda n: torch.float32)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_time_table_equals_the_time_mlp_of_every_step(subject, steps):
    config, tensors, model, _ = subject
    table, literal = model.time_table(steps), Literal(config, tensors)
    for step, t in enumerate([*flow.time_grid(steps, config.time_grid), 0.0]):
        e = literal.embed_time(torch.tensor([t]))
        if config.kind == "pi0":
            E = config.expert.width
            half = tensors["action_time_in.weight"][:, E:]
            wanted = functional.linear(e, half, tensors["action_time_in.bias"])
            assert (table.bias[step] - wanted[0]).abs().max() < TOLERANCE
            continue
        cond = functional.silu(literal.lin(functional.silu(literal.lin(e, "time_in")), "time_out"))
        names = [f"expert.layers.{i}.norm{n}" for i in range(config.expert.layers) for n in (1, 2)] + ["expert.norm"]
        for index, name in enumerate(names):
            wanted = literal.lin(cond, f"{name}.modulation")[0]
            assert (table.modulation[step, index] - wanted).abs().max() < TOLERANCE, name


def test_per_token_time_is_a_choice_of_row(subject):
    config, _, model, _ = subject
    table = model.time_table(4)
    committed = torch.arange(config.horizon) < 3
    chosen = table.at(2, committed)
    rows = table.modulation if config.kind == "pi05" else table.bias
    got = chosen.modulation.transpose(0, 1) if config.kind == "pi05" else chosen.bias
    assert all(torch.equal(got[k], rows[-1 if k < 3 else 2]) for k in range(config.horizon))


def test_state_token_keys_and_values_are_constant_over_the_steps():
    """pi0: what the literal suffix computes for the state token in any step is what the cache holds."""
    config = tiny_config("pi0")
    tensors = random_tensors(config)
    model, literal = build(config, tensors), Literal(config, tensors)
    g = torch.Generator().manual_seed(2)
    case = Case(
        torch.rand(1, 1, 3, 56, 56, generator=g), torch.ones(1, 1, dtype=torch.bool),
        torch.randint(0, 64, (1, 4), generator=g),
        torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 32, generator=g),
        torch.randn(1, config.horizon, 32, generator=g),
    )  # fmt: skip
    cache = prefill(model, case, compact=True)
    _, _, mask, past = literal.prefix(case)
    for t in (1.0, 0.3):
        act, e = literal.lin(case.noise * t, "action_in"), literal.embed_time(torch.full((1, config.horizon), t))
        act = literal.lin(functional.silu(literal.lin(torch.cat([act, e], -1), "action_time_in")), "action_time_out")
        tokens = torch.cat([literal.lin(case.state, "state")[:, None], act], 1)
        T = tokens.shape[1]
        block = torch.tensor([0] + [1] * (T - 1))
        see = torch.cat([mask[:, None].expand(1, T, -1), (block[None] <= block[:, None])[None]], -1)
        _, own = literal.stack("expert", config.expert, tokens, mask.sum() + torch.arange(T)[None], see, None, past)
        for layer, (k, v) in enumerate(own):
            assert (cache.k[layer][:, -1] - k[:, 0]).abs().max() < TOLERANCE
            assert (cache.v[layer][:, -1] - v[:, 0]).abs().max() < TOLERANCE
