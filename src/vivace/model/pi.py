"""pi0 and pi0.5, one definition. Five methods in the order in which they run:

    embed_views    views -> image tokens
    embed_prefix   image tokens and prompt -> prefix tokens
    prefill        prefix tokens -> keys and values of every layer (pi0: of the state token too)
    embed_suffix   noisy actions -> action tokens
    denoise_step   action tokens + keys and values -> velocity

Exact simplifications, always on (tests/model proves each equal to the literal formula): invalid tokens are left out; of the
last prefix layer only keys and values are computed; everything that depends only on flow time is a table, made once per
step schedule; pi0's state token never sees actions or time, so its keys and values are appended to the cache once;
q, k, v and gate, up are single matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from ..errors import ConfigError
from ..ops.layers import AnyLinear, Linear, RmsNorm, Rope
from ..ops.table import OpTable, reference_ops
from ..types import ModelInputs, PrefixCache, Trace
from . import flow, masks, transformer, vision


@dataclass(frozen=True)
class TimeTable:
    """Everything that depends only on flow time.  T = N steps + 1; the last row is t = 0, for committed actions.

    modulation  float32 [T, 2 * layers + 1, 3D], rows norm1, norm2 of every layer, then the final norm; None in pi0
    bias        float32 [T, D], the time half of pi0's action-time MLP; None in pi0.5
    times       flow time of every step, N values
    scaled      whether layers of the expert have input scales of their own in every step
    """

    times: tuple[float, ...]
    modulation: Tensor | None
    bias: Tensor | None
    scaled: bool = False

    def at(self, step: int, committed: Tensor | None = None) -> StepCondition:
        """Rows of one step; with `committed` (bool [H]) one row per action: t = 0 where True."""
        if committed is None:
            rows: Tensor | slice = slice(step, step + 1)
        else:
            rows = torch.where(committed, len(self.times), step)
        modulation = None if self.modulation is None else self.modulation[rows].transpose(0, 1)
        bias = None if self.bias is None else self.bias[rows]
        return StepCondition(modulation, bias, step if self.scaled else None)


@dataclass(frozen=True)
class StepCondition:
    """Time conditioning of one denoise step.  modulation [2*layers+1, 1 or H, 3D] or None; bias [1 or H, D] or None.

    step  the step whose input scales layers use, or None where they have one for all
    """

    modulation: Tensor | None
    bias: Tensor | None
    step: int | None = None

    def of(self, norm: int) -> Tensor | None:
        """Modulation of norm number `norm` (2*layer, 2*layer + 1, final = 2*layers)."""
        return None if self.modulation is None else self.modulation[norm]


@dataclass(frozen=True)
class RopeTables:
    """Rotary tables over all positions that a bucket can have, one per stack; two [P, head_dim/2] each."""

    prefix: Rope
    suffix: Rope


@dataclass(frozen=True)
class SuffixContext:
    """What all denoise steps of one request share: rotary table of the suffix positions, visible keys.

    await_keys  called with a layer's index before any of its operations; for callers that make the keys meanwhile
    """

    rope: Rope
    mask: Tensor | None
    await_keys: Callable[[int], None] | None = None


class Expert(transformer.GemmaStack):
    """The action expert: a Gemma stack, its final norm and, in pi0.5, the linears that make modulations."""

    def __init__(self, config: ModelConfig) -> None:
        modulated = config.kind == "pi05"
        super().__init__(config.expert, name="expert", modulated=modulated, last_only_kv=False)
        D, norms = config.expert.width, 2 * config.expert.layers + 1
        self.norm = RmsNorm(D, name="expert.norm", modulated=modulated)
        if modulated:
            # all modulation linears packed: rows of norm 0, norm 1, ...; used once per step schedule
            self.modulation = Linear(D, norms * 3 * D, name="expert.modulation", bias=True)


class Pi(nn.Module):
    """A pi0 or pi0.5 network with its weights; `ops` decides which kernels execute it."""

    def __init__(self, config: ModelConfig, *, ops: OpTable | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops = ops if ops is not None else reference_ops()
        D, E = config.prefix.width, config.expert.width
        self.vision = vision.Vision(config.vision)
        self.projector = Linear(config.vision.width, D, name="projector", bias=True)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, D))
        self.prefix = transformer.GemmaStack(config.prefix, name="prefix", modulated=False, last_only_kv=True)
        self.expert = Expert(config)
        self.action_in = Linear(config.action_width, E, name="action_in", bias=True)
        self.action_out = Linear(E, config.action_width, name="action_out", bias=True)
        if config.kind == "pi05":
            self.time_in = Linear(E, E, name="time_in", bias=True)
            self.time_out = Linear(E, E, name="time_out", bias=True)
        else:
            self.state = Linear(config.action_width, E, name="state", bias=True)
            self.action_time_in = Linear(2 * E, E, name="action_time_in", bias=True)
            self.action_time_out = Linear(E, E, name="action_time_out", bias=True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def prefix_dtype(self) -> torch.dtype:
        """Compute dtype of the prefix."""
        return self.embedding.dtype

    @property
    def suffix_dtype(self) -> torch.dtype:
        """Compute dtype of the action expert."""
        return self.expert.block(0).qkv.dtype

    # --- prefix -------------------------------------------------------------------------------------------------

    def embed_views(self, images: Shaped[Tensor, "B V 3 size size"]) -> Float[Tensor, "B P D"]:
        """Views to prefix tokens.  images [B, V, 3, 224, 224] -> [B, V * 256, D]."""
        B, V = images.shape[:2]
        encoded = vision.encode(self.vision, images.flatten(0, 1), self.ops, into=self.projector)
        tokens = self.ops.linear(encoded, self.projector)
        batched: Tensor = tokens.unflatten(0, (B, V))
        return batched.flatten(1, 2)

    def embed_prompt(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Prompt to prefix tokens, scaled by sqrt(D).  int [B, L] -> [B, L, D]."""
        return functional.embedding(tokens, self.embedding) * math.sqrt(self.config.prefix.width)

    def embed_prefix(
        self, inputs: ModelInputs, views: Float[Tensor, "B P D"]
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"] | None]:
        """The observation as tokens.  views [B, V*256, D] from `embed_views`.

        returns  prefix [B, S, D] = views then prompt,  mask bool [B, S] or None = all valid
        """
        B, V = inputs.images.shape[:2]
        shape = (B, V, self.config.vision.tokens, inputs.tokens.shape[1])
        mask = masks.prefix_mask(inputs.view_mask, inputs.token_mask, shape=shape)
        return torch.cat([views, self.embed_prompt(inputs.tokens)], dim=1), mask

    def prefill(
        self,
        embeds: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S"] | None,
        *,
        state: Float[Tensor, "B A"] | None = None,
        tables: RopeTables | None = None,
        written: Callable[[int], None] | None = None,
    ) -> PrefixCache:
        """Keys and values of every prefix layer; pi0 appends those of its state token.

        embeds [B, S, D],  mask bool [B, S] or None,  state float32 [B, 32] (pi0),  tables from `rope_tables`,
        written  called with a layer's index when its keys and values (and, from layer 0 on, the mask) are there
        """
        stack, x = self.prefix, embeds.to(self.prefix_dtype)
        B, S = x.shape[:2]
        if tables is not None and mask is None:
            rope = transformer.rope_rows(tables.prefix, slice(0, S))
        else:
            positions = masks.positions(mask, shape=(B, S), device=x.device)
            rope = self._rope(positions, stack, x.dtype, tables.prefix if tables is not None else None)
        length = masks.lengths(mask, shape=(B, S), device=x.device)
        written = written if written is not None else _ignore
        keys, values = [], []
        n = self.ops.rms_norm(x, stack.block(0).norm1, None, stack.block(0).qkv)
        for index in range(stack.config.layers - 1):
            block, following = stack.block(index), stack.block(index + 1)
            q, k, v = self.ops.qkv_rope(n, block.qkv, rope, stack.heads)
            keys.append(k)
            values.append(v)
            written(index)
            mixed = self.ops.attention(q, k, v, mask, None, block.o)
            x, n = transformer.finish(
                block, x, mixed, self.ops, modulations=(None, None), following=(following.norm1, None, following.qkv)
            )
        k, v = self.ops.kv_rope(n, stack.block(stack.config.layers - 1).qkv, rope, stack.heads[1:])
        written(stack.config.layers - 1)
        cache = PrefixCache(k=(*keys, k), v=(*values, v), length=length, mask=mask)
        return cache if self.config.kind == "pi05" else self._append_state(cache, state, tables)

    def rope_tables(self, positions: int) -> RopeTables:
        """Rotary tables of positions 0 .. `positions`-1 for both stacks, for callers that run often."""
        every = torch.arange(positions, device=self.device)
        return RopeTables(
            transformer.rope_table(every, self.config.prefix.head_dim, self.prefix_dtype),
            transformer.rope_table(every, self.config.expert.head_dim, self.suffix_dtype),
        )

    def _rope(self, positions: Tensor, stack: transformer.GemmaStack, dtype: torch.dtype, table: Rope | None) -> Rope:
        if table is not None:
            return transformer.rope_rows(table, positions)
        return transformer.rope_table(positions, stack.config.head_dim, dtype)

    def _append_state(self, cache: PrefixCache, state: Tensor | None, tables: RopeTables | None) -> PrefixCache:
        """pi0: run the state token alone through the expert and add its keys and values to the cache."""
        assert state is not None, "pi0 needs the normalised state"
        stack = self.expert
        x = self.ops.linear(state.to(self.state.weight.dtype), self.state)[:, None].to(self.suffix_dtype)
        context = self.suffix_context(cache, 1, tables=tables)
        keys, values = [], []
        n = self.ops.rms_norm(x, stack.block(0).norm1, None, stack.block(0).qkv)
        for index in range(stack.config.layers):
            block = stack.block(index)
            q, k, v = self.ops.qkv_rope(n, block.qkv, context.rope, stack.heads)
            keys.append(torch.cat([cache.k[index], k.to(cache.k[index].dtype)], dim=1))
            values.append(torch.cat([cache.v[index], v.to(cache.v[index].dtype)], dim=1))
            if index + 1 < stack.config.layers:
                following = stack.block(index + 1)
                mixed = self.ops.attention(q, k, v, context.mask, (cache.k[index], cache.v[index]), block.o)
                x, n = transformer.finish(
                    block, x, mixed, self.ops,
                    modulations=(None, None), following=(following.norm1, None, following.qkv),
                )  # fmt: skip
        return PrefixCache(k=tuple(keys), v=tuple(values), length=cache.length + 1, mask=context.mask)

    # --- suffix -------------------------------------------------------------------------------------------------

    def time_table(self, num_steps: int) -> TimeTable:
        """Precompute all conditioning on flow time for a schedule of `num_steps` Euler steps. Pure function of weights.

        Raises ConfigError if layers have input scales for another number of steps.
        """
        config, E, scaled = self.config, self.config.expert.width, self.has_step_scales(num_steps)
        times = flow.time_grid(num_steps, config.time_grid)
        dtype = torch.float64 if config.time_embedding == "float64" else torch.float32
        embedded = flow.time_embedding(
            torch.tensor([*times, 0.0], device=self.device),
            E,
            min_period=config.min_period,
            max_period=config.max_period,
            dtype=dtype,
        )
        if config.kind == "pi0":
            layer = self.action_time_in
            bias = functional.linear(embedded.to(layer.weight.dtype), layer.weight[:, E:], layer.bias)
            return TimeTable(tuple(times), None, bias, scaled)
        ops = self.ops
        hidden = functional.silu(ops.linear(embedded.to(self.time_in.weight.dtype), self.time_in))
        condition = functional.silu(ops.linear(hidden, self.time_out))
        packed = ops.linear(condition.to(self.expert.modulation.weight.dtype), self.expert.modulation)
        return TimeTable(tuple(times), packed.float().unflatten(-1, (-1, 3 * E)), None, scaled)

    def has_step_scales(self, num_steps: int) -> bool:
        """Whether layers of the expert have input scales of their own in each of `num_steps` steps.

        Raises ConfigError if they have them for another number of steps.
        """
        scaled = self.expert.scaled_steps()
        if scaled not in (0, num_steps):
            raise ConfigError(
                "the precision plan has input scales for another number of denoise steps", got=num_steps, wanted=scaled,
                do="use that number, or calibrate again",
            )  # fmt: skip
        return scaled > 0

    def suffix_context(self, cache: PrefixCache, suffix: int, *, tables: RopeTables | None = None) -> SuffixContext:
        """Positions and visible keys of `suffix` tokens that follow the cache; tables from `rope_tables`."""
        if tables is not None and cache.mask is None:
            S = cache.k[0].shape[1]
            rope = transformer.rope_rows(tables.suffix, slice(S, S + suffix))
        else:
            positions = cache.length[:, None] + torch.arange(suffix, device=cache.length.device)
            rope = self._rope(positions, self.expert, self.suffix_dtype, tables.suffix if tables is not None else None)
        return SuffixContext(rope=rope, mask=masks.with_suffix(cache.mask, suffix))

    def embed_suffix(self, x: Float[Tensor, "B H A"], condition: StepCondition) -> Float[Tensor, "B H E"]:
        """Noisy actions to action tokens.  x float32 [B, H, 32] -> [B, H, E] in the expert's compute dtype."""
        tokens = self.ops.linear(x.to(self.action_in.weight.dtype), self.action_in)
        if condition.bias is not None:
            E = self.config.expert.width
            mixed = functional.linear(tokens, self.action_time_in.weight[:, :E]) + condition.bias
            tokens = self.ops.linear(functional.silu(mixed), self.action_time_out)
        return tokens.to(self.suffix_dtype)

    def denoise_step(
        self, x: Float[Tensor, "B H A"], condition: StepCondition, cache: PrefixCache, context: SuffixContext
    ) -> Float[Tensor, "B H A"]:
        """Velocity of the flow at x.  x float32 [B, H, 32] -> float32 [B, H, 32]."""
        tokens, n = self._enter(x, condition)
        return self.ops.linear(self._layers(tokens, n, condition, cache, context), self.action_out).float()

    def denoise_chunk(
        self,
        x: Float[Tensor, "B H A"],
        table: TimeTable,
        cache: PrefixCache,
        context: SuffixContext,
        *,
        trace: Trace | None = None,
    ) -> Float[Tensor, "B H A"]:
        """All Euler steps of `table`, as `flow.sample` over `denoise_step` makes them without an older chunk (pi0.5 only).

        The end of a step and the beginning of the next are one operation here, which a kernel can take.
        context.await_keys is for the first step: later ones find all keys.
        """
        dt, count = -1.0 / len(table.times), len(table.times)
        tokens, n = self._enter(x, table.at(0))
        states, velocities = [x], []
        for step in range(count):
            n = self._layers(tokens, n, table.at(step), cache, context)
            context = replace(context, await_keys=None)
            if step + 1 < count:
                following = table.at(step + 1)
                first = self.expert.block_at(0, following.step)
                velocity, x, tokens, n = self.ops.step_boundary(
                    n, self.action_out, x, dt, self.action_in, first.norm1, following.of(0), first.qkv
                )
            else:
                velocity = self.ops.linear(n, self.action_out).float()
                x = torch.add(x, velocity, alpha=dt)
            velocities.append(velocity)
            states.append(x)
        if trace is not None:
            trace.x += [state.clone() for state in states]
            trace.velocity += [velocity.clone() for velocity in velocities]
            trace.velocity_used += [velocity.clone() for velocity in velocities]
        return x

    def _enter(self, x: Tensor, condition: StepCondition) -> tuple[Tensor, Tensor]:
        """Action tokens of noisy actions, and their first norm."""
        tokens, first = self.embed_suffix(x, condition), self.expert.block_at(0, condition.step)
        return tokens, self.ops.rms_norm(tokens, first.norm1, condition.of(0), first.qkv)

    def _layers(
        self, tokens: Tensor, n: Tensor, condition: StepCondition, cache: PrefixCache, context: SuffixContext
    ) -> Tensor:
        """All blocks of the expert; returns the final norm, as `action_out` takes it."""
        stack = self.expert
        blocks = [stack.block_at(index, condition.step) for index in range(stack.config.layers)]
        for index, block in enumerate(blocks):
            if context.await_keys is not None:
                context.await_keys(index)
            q, k, v = self.ops.qkv_rope(n, block.qkv, context.rope, stack.heads)
            mixed = self.ops.attention(q, k, v, context.mask, (cache.k[index], cache.v[index]), block.o)
            tokens, n = transformer.finish(
                block, tokens, mixed, self.ops,
                modulations=(condition.of(2 * index), condition.of(2 * index + 1)),
                following=self._after(index, blocks, condition),
            )  # fmt: skip
        return n

    def _after(
        self, index: int, blocks: Sequence[transformer.GemmaBlock | transformer.StepBlock], condition: StepCondition
    ) -> tuple[RmsNorm, Tensor | None, AnyLinear]:
        """The norm behind expert block `index`, its modulation and its reader: the next block's first, or the final one."""
        modulation = condition.of(2 * index + 2)
        if index + 1 == self.expert.config.layers:
            return self.expert.norm, modulation, self.action_out
        block = blocks[index + 1]
        return block.norm1, modulation, block.qkv


def _ignore(_layer: int) -> None:
    """Nobody waits for single layers."""
