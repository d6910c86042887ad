"""The loss: squared error of the velocity that turns noise into the demonstrated chunk.

x_t = t * noise + (1 - t) * actions, target = noise - actions, t = 0.999 * Beta(1.5, 1) + 0.001 (pi0; openpi's convention,
t = 1 is noise). Committed actions (training-time real-time chunking, arXiv 2512.05964): the first d rows are clean, carry
flow time 0, and are not part of the loss; d is drawn for each sample. Every observation is used with several draws of
(noise, t, d): the prefix costs most of a step, and its keys and values serve all of them.

All action dimensions count, the padded ones too: the sampler integrates them, so they must be learnt (they are an easy
x_t / t). The network is `Pi` as served; only the attention operation is replaced by torch's fused one, same formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..model import flow
from ..model.pi import Pi, StepCondition
from ..ops.layers import AnyLinear
from ..ops.reference import hand_over
from ..ops.table import OpTable, reference_ops
from ..types import ModelInputs, PrefixCache

TIME_ALPHA, TIME_SCALE, TIME_MIN = 1.5, 0.999, 0.001


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, for B observations with R flows each.

    noise float32 [B, R, H, A]      times float32 [B, R]      committed int64 [B, R], leading clean actions
    """

    noise: Tensor
    times: Tensor
    committed: Tensor


@dataclass(frozen=True)
class Batch:
    """images uint8 or float32 in [-1, 1] [B, V, 3, px, px]; tokens int64 [B, L]; token_mask bool [B, L] or None;
    actions float32 [B, R, H, A], normalised and padded.
    """

    images: Tensor
    tokens: Tensor
    token_mask: Tensor | None
    actions: Tensor


def flow_times(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Flow times, float32: Beta(1.5, 1) by its inverse distribution function u^(2/3), moved into [0.001, 1]."""
    uniform = torch.rand(shape, generator=generator, device=device)
    return uniform ** (1.0 / TIME_ALPHA) * TIME_SCALE + TIME_MIN


def training_ops() -> OpTable:
    """The reference operations with fused attention, which does not store the scores for the backward pass."""
    return replace(reference_ops(), attention=fused_attention)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    into: AnyLinear,
) -> Tensor:
    """Contract of `ops.reference.attention`; softmax and sums as torch's scaled_dot_product_attention does them."""
    B, T, N, head_dim = q.shape
    K = k.shape[2]
    if past is not None:
        k, v = torch.cat([past[0], k.to(past[0].dtype)], dim=1), torch.cat([past[1], v.to(past[1].dtype)], dim=1)
    rows = q.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).reshape(B, K, (N // K) * T, head_dim)
    seen = None if mask is None else mask[:, None, None, :]
    k, v = k.transpose(1, 2).to(rows.dtype), v.transpose(1, 2).to(rows.dtype)
    mixed = functional.scaled_dot_product_attention(rows, k, v, attn_mask=seen).unflatten(2, (N // K, T))
    return hand_over(mixed.permute(0, 3, 1, 2, 4).reshape(B, T, N * head_dim), into)


def conditions(model: Pi, times: Tensor, committed: Tensor) -> StepCondition:
    """Time conditioning of pi0.5 with one row per action.  times [B], committed bool [B, H] (their time is 0).

    The formula of `Pi.time_table`, for times that differ within a batch; tests hold the two together.
    """
    config, ops = model.config, model.ops
    dtype = torch.float64 if config.time_embedding == "float64" else torch.float32
    every = torch.cat([times, times.new_zeros(1)])  # the last row is t = 0
    embedded = flow.time_embedding(
        every, config.expert.width, min_period=config.min_period, max_period=config.max_period, dtype=dtype
    )
    hidden = functional.silu(ops.linear(embedded.to(model.time_in.weight.dtype), model.time_in))
    condition = functional.silu(ops.linear(hidden, model.time_out))
    packed = ops.linear(condition, model.expert.modulation).float().unflatten(-1, (-1, 3 * config.expert.width))
    rows = packed.transpose(0, 1)  # [norms, B + 1, 3D]
    clean = rows[:, -1:, None, :]
    return StepCondition(torch.where(committed[None, :, :, None], clean, rows[:, :-1, None, :]), None)


def loss(model: Pi, batch: Batch, draws: Draws) -> Tensor:
    """Mean squared error of the velocity over actions that are not committed; a scalar."""
    R, H = batch.actions.shape[1:3]
    inputs = ModelInputs(images=batch.images, tokens=batch.tokens, token_mask=batch.token_mask)
    embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
    cache = _repeat(model.prefill(embeds, mask), R)
    actions, noise = batch.actions.flatten(0, 1), draws.noise.flatten(0, 1)
    committed = torch.arange(H, device=actions.device) < draws.committed.flatten()[:, None]
    t = draws.times.flatten()[:, None, None]
    x = torch.where(committed[..., None], actions, t * noise + (1.0 - t) * actions)
    condition = conditions(model, draws.times.flatten(), committed)
    velocity = model.denoise_step(x, condition, cache, model.suffix_context(cache, H))
    error = (velocity - (noise - actions)).square().mean(-1)
    free = (~committed).float()
    return (error * free).sum() / free.sum().clamp_min(1.0)


def _repeat(cache: PrefixCache, times: int) -> PrefixCache:
    """Every observation `times` in a row."""
    if times == 1:
        return cache
    return PrefixCache(
        k=tuple(k.repeat_interleave(times, 0) for k in cache.k),
        v=tuple(v.repeat_interleave(times, 0) for v in cache.v),
        length=cache.length.repeat_interleave(times, 0),
        mask=None if cache.mask is None else cache.mask.repeat_interleave(times, 0),
    )
