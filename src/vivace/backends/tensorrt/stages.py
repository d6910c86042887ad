"""A policy whose three stages are engines; to the backends of torch it looks like the model.

What TensorRT does not run stays in torch: pixels to [-1, 1], the prompt's embedding, the table over flow time, positions
and masks. Networks are written for static shapes and made when a shape is first seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ShapeError
from ...model import flow, masks, transformer
from ...model.pi import Pi, RopeTables, StepCondition, SuffixContext, TimeTable
from ...ops.layers import Rope
from ...ops.reference import MASKED_LOGIT, to_unit_range
from ...ops.table import OpTable
from ...types import ModelInputs, PrefixCache, Trace
from .networks import Part, Shapes


class Runner(Protocol):
    """Runs the network of one part and shape: {input: tensor} -> {output: tensor}."""

    def __call__(self, part: Part, shapes: Shapes, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See the class."""
        ...


class EnginePolicy:
    """The methods of `model.Pi` that backends call, with the same contracts.

    model  the loaded policy: what stays in torch        base  compute dtype of the engines
    loop   run all steps as one engine where nothing is traced
    """

    def __init__(self, model: Pi, run: Runner, *, base: torch.dtype, loop: bool = False) -> None:
        self.model, self._run, self._base, self._loop = model, run, base, loop
        self.config, self.device = model.config, model.device
        self.ops: OpTable = model.ops

    # --- prefix -----------------------------------------------------------------------------------------------------

    def embed_views(self, images: Tensor) -> Tensor:
        """See Pi.embed_views."""
        B, V = images.shape[:2]
        pixels = to_unit_range(images).flatten(0, 1).contiguous()
        tokens = self._run("vision", Shapes(batch=B * V), {"images": pixels})["tokens"]
        return tokens.reshape(B, -1, tokens.shape[-1])

    def embed_prefix(self, inputs: ModelInputs, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """See Pi.embed_prefix."""
        return self.model.embed_prefix(inputs, views)

    def prefill(
        self, embeds: Tensor, mask: Tensor | None, *, state: Tensor | None = None, tables: RopeTables | None = None,
        written: Callable[[int], None] | None = None,
    ) -> PrefixCache:  # fmt: skip
        """See Pi.prefill. `written` is called when all layers are there."""
        B, S = embeds.shape[:2]
        tables = tables if tables is not None else self.rope_tables(S + 1)
        positions = masks.positions(mask, shape=(B, S), device=embeds.device)
        length = masks.lengths(mask, shape=(B, S), device=embeds.device)
        feeds = {"embeds": embeds.to(self._base).contiguous(), "mask": _additive(mask, (B, S), embeds.device)}
        feeds |= _rows(tables.prefix, positions)
        if self.config.kind == "pi0":
            assert state is not None, "pi0 needs the normalised state"
            rows = _rows(tables.suffix, length[:, None])
            feeds |= {"state": state.float().contiguous(), "state_cos": rows["cos"], "state_sin": rows["sin"]}
            length, mask = length + 1, masks.with_suffix(mask, 1)
        found = self._run("prefix", Shapes(batch=B, keys=S), feeds)
        layers = range(self.config.prefix.layers)
        if written is not None:
            for layer in layers:
                written(layer)
        k, v = (tuple(found[f"{letter}.{layer}"] for layer in layers) for letter in "kv")
        return PrefixCache(k=k, v=v, length=length, mask=mask)

    def rope_tables(self, positions: int) -> RopeTables:
        """See Pi.rope_tables; in the engines' type."""
        every = torch.arange(positions, device=self.device)
        widths = (self.config.prefix.head_dim, self.config.expert.head_dim)
        prefix, suffix = (transformer.rope_table(every, width, self._base) for width in widths)
        return RopeTables(prefix, suffix)

    # --- suffix -----------------------------------------------------------------------------------------------------

    def time_table(self, num_steps: int) -> TimeTable:
        """See Pi.time_table."""
        return self.model.time_table(num_steps)

    def has_step_scales(self, num_steps: int) -> bool:
        """See Pi.has_step_scales; engines have none (`skeleton.why_not_scales`)."""
        return self.model.has_step_scales(num_steps)

    def suffix_context(self, cache: PrefixCache, suffix: int, *, tables: RopeTables | None = None) -> SuffixContext:
        """See Pi.suffix_context; the mask is the additive one of the cached keys, float32 [B, keys]."""
        B, keys = cache.k[0].shape[:2]
        tables = tables if tables is not None else self.rope_tables(keys + suffix)
        positions = cache.length[:, None] + torch.arange(suffix, device=cache.length.device)
        rows = _rows(tables.suffix, positions)
        mask = _additive(cache.mask, (B, keys), cache.k[0].device)
        return SuffixContext(rope=Rope((rows["cos"], rows["sin"])), mask=mask)

    def denoise_step(self, x: Tensor, condition: StepCondition, cache: PrefixCache, context: SuffixContext) -> Tensor:
        """See Pi.denoise_step."""
        timed = condition.modulation if condition.modulation is not None else condition.bias
        assert timed is not None, "a step without a flow time"
        feeds, shapes = self._suffix(x, timed, cache, context), self._shapes(cache, rows=timed.shape[-2])
        return self._run("step", shapes, feeds)["velocity"]

    def denoise_chunk(
        self, x: Tensor, table: TimeTable, cache: PrefixCache, context: SuffixContext, *, trace: Trace | None = None
    ) -> Tensor:
        """See Pi.denoise_chunk."""
        if self._loop and trace is None:
            timed = table.modulation if table.modulation is not None else table.bias
            assert timed is not None, "a schedule without flow times"
            shapes = self._shapes(cache, steps=len(table.times))
            return self._run("loop", shapes, self._suffix(x, timed, cache, context))["actions"]
        return flow.sample(
            lambda now, step: self.denoise_step(now, table.at(step), cache, context), x, list(table.times), trace=trace
        )

    def _shapes(self, cache: PrefixCache, *, rows: int = 1, steps: int = 0) -> Shapes:
        B, keys = cache.k[0].shape[:2]
        return Shapes(batch=B, keys=keys - (self.config.kind == "pi0"), rows=rows, steps=steps)

    def _suffix(self, x: Tensor, timed: Tensor, cache: PrefixCache, context: SuffixContext) -> dict[str, Tensor]:
        if x.shape[1] != self.config.horizon:
            raise ShapeError("engines are built for one horizon", got=x.shape[1], wanted=self.config.horizon)
        assert context.mask is not None, "made by another suffix_context"
        cos, sin = context.rope
        feeds = {"x": x.contiguous(), "mask": context.mask, "cos": cos, "sin": sin}
        feeds["modulation" if self.config.kind == "pi05" else "bias"] = timed.float().contiguous()
        for layer, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
            feeds |= {f"k.{layer}": k.contiguous(), f"v.{layer}": v.contiguous()}
        return feeds


def _rows(table: Rope, positions: Tensor) -> dict[str, Tensor]:
    cos, sin = table
    return {"cos": cos[positions].contiguous(), "sin": sin[positions].contiguous()}


def _additive(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Added to scores: 0 where a key may be seen.  bool [B, S] or None -> float32 [B, S]."""
    if mask is None:
        return torch.zeros(shape, device=device)
    return torch.where(mask, 0.0, MASKED_LOGIT)
