"""The training objective against the served forward and against literal formulas."""

from __future__ import annotations

import pytest
import torch

from vivace.config import GemmaConfig, ModelConfig, VisionConfig
from vivace.ops import reference
from vivace.ops.layers import Linear
from vivace.train import objective
from vivace.train.initialise import fresh

CPU = torch.device("cpu")
GEMMA = {"layers": 2, "mlp_width": 32, "num_heads": 2, "head_dim": 16}
TINY = ModelConfig(
    vision=VisionConfig(width=16, layers=1, mlp_width=32, num_heads=2, patch_size=8, image_size=16),
    prefix=GemmaConfig(width=32, **GEMMA), expert=GemmaConfig(width=16, **GEMMA),
    vocab_size=64, action_width=6, horizon=5, time_grid="direct", flavour="lerobot",
)  # fmt: skip


def random_model(seed: int = 0):
    """Fresh weights plus noise: the zero modulations of a fresh network would hide every conditioning error."""
    model = fresh(TINY, seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(B: int = 2, R: int = 3, *, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    actions = torch.randn(B, R, TINY.horizon, TINY.action_width, generator=g)
    return (
        objective.Batch(
            images=torch.rand(B, 2, 3, 16, 16, generator=g) * 2 - 1,
            tokens=torch.randint(0, 64, (B, 7), generator=g),
            token_mask=None,
            actions=actions,
        ),
        objective.Draws(
            noise=torch.randn(actions.shape, generator=g),
            times=objective.flow_times((B, R), g, CPU),
            committed=torch.randint(0, 4, (B, R), generator=g),
        ),
    )


def test_conditions_are_the_rows_of_the_served_table():
    model = random_model()
    table = model.time_table(5)
    committed = torch.tensor([False, True, False, False, True])
    for step, t in enumerate(table.times):
        got = objective.conditions(model, torch.tensor([t]), committed[None]).modulation[:, 0]
        torch.testing.assert_close(got, table.at(step, committed).modulation, rtol=1e-5, atol=1e-5)
    other = objective.conditions(model, torch.tensor([0.5]), committed[None]).modulation[:, 0]
    assert not torch.allclose(other, table.at(0, committed).modulation, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_reference(masked):
    g = torch.Generator().manual_seed(0)
    B, T, S, N, K, d = 2, 3, 4, 4, 2, 8
    q, k, v = (torch.randn(B, T, n, d, generator=g) for n in (N, K, K))
    past = (torch.randn(B, S, K, d, generator=g), torch.randn(B, S, K, d, generator=g))
    mask = None
    if masked:
        mask = torch.ones(B, S + T, dtype=torch.bool)
        mask[0, 2:4] = False
    into = Linear(N * d, 1, name="into")
    args = (q, k, v, mask, past, into)
    torch.testing.assert_close(objective.fused_attention(*args), reference.attention(*args), rtol=1e-5, atol=1e-5)


def test_loss_is_the_literal_formula_of_the_served_steps():
    """Every observation and flow alone, through `TimeTable`-like rows and the reference operations."""
    model = random_model()
    examples, draws = batch()
    errors = []
    for b in range(2):
        inputs = objective.ModelInputs(images=examples.images[b : b + 1], tokens=examples.tokens[b : b + 1])
        embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
        cache = model.prefill(embeds, mask)
        for r in range(3):
            t, d = draws.times[b, r], int(draws.committed[b, r])
            a, noise = examples.actions[b, r], draws.noise[b, r]
            x = t * noise + (1 - t) * a
            x[:d] = a[:d]
            committed = (torch.arange(TINY.horizon) < d)[None]
            condition = objective.conditions(model, t[None], committed)
            v = model.denoise_step(x[None], condition, cache, model.suffix_context(cache, TINY.horizon))[0]
            errors.append(((v - (noise - a)) ** 2)[d:].mean(-1))
    wanted = torch.cat(errors).mean()
    model.ops = objective.training_ops()
    torch.testing.assert_close(objective.loss(model, examples, draws), wanted, rtol=1e-5, atol=1e-5)


def test_committed_actions_carry_no_loss_but_are_seen():
    model = random_model()
    examples, draws = batch()
    all_but_one = torch.full_like(draws.committed, TINY.horizon - 1)
    changed = examples.actions.clone()
    changed[:, :, 0] += 1.0
    draws = objective.Draws(draws.noise, draws.times, all_but_one)
    other = objective.Draws(draws.noise + 1.0 * (torch.arange(TINY.horizon) == 0)[:, None], draws.times, all_but_one)
    one = objective.loss(model, examples, draws)
    assert objective.loss(model, examples, other) == one, "noise of a committed action reached the loss"
    moved = objective.Batch(examples.images, examples.tokens, None, changed)
    assert not torch.isclose(objective.loss(model, moved, draws), one), "committed actions are not seen"


def test_padded_prompts_do_not_change_the_loss():
    model = random_model()
    examples, draws = batch()
    padded = torch.cat([examples.tokens, torch.full((2, 3), 9)], 1)
    mask = torch.arange(10)[None].expand(2, 10) < 7
    same = objective.Batch(examples.images, padded, mask, examples.actions)
    torch.testing.assert_close(objective.loss(model, same, draws), objective.loss(model, examples, draws))


def test_every_parameter_gets_a_gradient():
    model = random_model()
    objective.loss(model, *batch()).backward()
    # the last prefix layer's norm and keys do count; nothing is left out
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_flow_times_are_beta():
    times = objective.flow_times((200_000,), torch.Generator().manual_seed(0), CPU)
    assert times.min() >= 0.001
    assert times.max() <= 1.0
    beta = torch.distributions.Beta(1.5, 1.0)
    assert abs(float(times.mean()) - (0.999 * float(beta.mean) + 0.001)) < 2e-3
    assert abs(float(times.var()) - float(beta.variance)) < 2e-3
