"""The model's operation table, written as TensorRT layers; each has the contract of its namesake in `ops.reference`.

Rounding is where the reference rounds, with two differences. The operands of an E4M3 or INT8 product leave their
DequantizeLinear in the base type, as TensorRT's pattern for an 8-bit kernel demands. And attention scales the queries, not
the scores, so that FP16 scores cannot overflow before they are scaled (the same up to a rounding; exact where the head size
is a power of 4).

Every matrix product is named "operation|layer", which the coverage audit reads.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from ...ops.layers import LayerNorm, Linear, QuantisedLinear, RmsNorm, Rope
from ...ops.reference import NORM_EPS
from ...ops.table import OpTable
from .symbols import Sym, Writer

AnyLinear = Linear | QuantisedLinear
RopeRows = tuple[Sym, Sym]


def writing_ops(writer: Writer, *, batch: int, mask: Sym | None = None, fused: bool = False) -> OpTable:
    """Operations that append to `writer`.

    batch  requests (or views) per call: quantised rows [batch * T, D] find their way back to [batch, T, D] by it
    mask   float32 [batch, S], added to the scores of the first S keys: 0 = may be seen; later keys are always seen
    fused  attention and rotation as TensorRT's own layers, where the module has them
    """
    written = Operations(writer, batch, mask, fused)
    names = OpTable.__dataclass_fields__
    return OpTable(**{name: cast(Any, getattr(written, name)) for name in names})


class Operations:
    """See `writing_ops`; methods are the entries of the operation table."""

    def __init__(self, writer: Writer, batch: int, mask: Sym | None, fused: bool) -> None:
        self.writer, self.batch, self.mask, self.fused = writer, batch, mask, fused
        if fused:
            missing = [name for name in ("attention", "rotary_embedding") if not writer.module.offers(name)]
            assert not missing, f"{writer.module.label} has no layers {missing}"

    # --- products -------------------------------------------------------------------------------------------------

    def hand_over(self, x: Sym, into: AnyLinear) -> Sym:
        """x as `into` takes it; E4M3 and INT8 as rows [batch * T, D]."""
        if not isinstance(into, QuantisedLinear):
            return x.to(into.dtype)
        if x.dtype == into.stored:
            return x
        rows = self.writer.reshape(x, [math.prod(x.shape[:-1]), x.shape[-1]])
        return self.writer.quantize(rows, self._scale(into), into.stored)

    def linear(self, x: Sym, layer: AnyLinear, operation: str = "linear") -> Sym:
        """See reference.linear."""
        w, name = self.writer, f"{operation}|{layer.name}"
        if isinstance(layer, QuantisedLinear):
            rows = w.dequantize(self.hand_over(x, layer), self._scale(layer), layer.dtype)
            weight = w.dequantize(w.parameter(layer.weight), w.parameter(layer.weight_scale), layer.dtype, axis=0)
            out = w.matmul(rows, weight, name=name, transpose=True)
            out = w.reshape(out, [self.batch, out.shape[0] // self.batch, out.shape[-1]])
        else:
            out = w.matmul(x.to(layer.dtype), w.parameter(layer.weight), name=name, transpose=True)
        return out if layer.bias is None else out + w.parameter(layer.bias).to(out.dtype)

    def linear_gelu(self, x: Sym, layer: AnyLinear, into: AnyLinear) -> Sym:
        """See reference.linear_gelu."""
        return self.hand_over(self.writer.activation("GELU_TANH", self.linear(x, layer, "linear_gelu")), into)

    def linear_residual_norm(
        self, x: Sym, layer: AnyLinear, residual: Sym, gate: Sym | None, norm: RmsNorm | LayerNorm,
        modulation: Sym | None, into: AnyLinear,
    ) -> tuple[Sym, Sym]:  # fmt: skip
        """See reference.linear_residual_norm."""
        branch = self.linear(x, layer, "linear_residual_norm")
        if gate is not None:
            branch = branch * gate.to(branch.dtype)
        total = residual + branch.to(residual.dtype)
        if isinstance(norm, LayerNorm):
            return total, self.layer_norm(total, norm, into)
        return total, self.rms_norm(total, norm, modulation, into)

    def geglu(self, x: Sym, layer: AnyLinear, into: AnyLinear) -> Sym:
        """See reference.geglu."""
        gate, up = self.linear(x, layer, "geglu").chunk(2, dim=-1)
        return self.hand_over(self.writer.activation("GELU_TANH", gate) * up, into)

    def patch_embed(self, images: Sym, layer: Linear, position: Any, dtype: torch.dtype) -> Sym:
        """See reference.patch_embed; images are float32 in [-1, 1]."""
        w, (V, C, size, _) = self.writer, images.shape
        patch = math.isqrt(layer.weight.shape[1] // C)
        grid = size // patch
        cut = w.permute(w.reshape(images, [V, C, grid, patch, grid, patch]), [0, 2, 4, 1, 3, 5])
        pixels = w.reshape(cut, [V, grid * grid, C * patch * patch])
        return (self.linear(pixels, layer, "patch_embed") + w.parameter(position)).to(dtype)

    # --- norms ----------------------------------------------------------------------------------------------------

    def layer_norm(self, x: Sym, norm: LayerNorm, into: AnyLinear) -> Sym:
        """See reference.layer_norm."""
        w, wide = self.writer, x.float()
        centred = wide - w.mean(wide)
        normed = centred * self._inverse_root(w.mean(centred * centred))
        scaled = normed * w.parameter(norm.weight).float() + w.parameter(norm.bias).float()
        return self.hand_over(scaled.to(x.dtype), into)

    def rms_norm(self, x: Sym, norm: RmsNorm, modulation: Sym | None, into: AnyLinear) -> Sym:
        """See reference.rms_norm."""
        w, wide = self.writer, x.float()
        normed = wide * self._inverse_root(w.mean(wide * wide))
        if modulation is not None:
            scale, shift, _ = modulation.chunk(3, dim=-1)
            return self.hand_over((normed * (scale + 1.0) + shift).to(x.dtype), into)
        assert norm.weight is not None, f"{norm.name} has no weight and was given no modulation"
        return self.hand_over((normed * (w.parameter(norm.weight).float() + 1.0)).to(x.dtype), into)

    def _inverse_root(self, x: Sym) -> Sym:
        return self.writer.unary("RECIP", self.writer.unary("SQRT", x + NORM_EPS))

    def _scale(self, layer: QuantisedLinear) -> Sym:
        """The layer's input scale as a scalar, which is what a per-tensor scale must be."""
        key = ("scale", layer.name)
        if key not in self.writer.known:
            self.writer.known[key] = self.writer.reshape(self.writer.parameter(layer.input_scale), ())
        return self.writer.known[key]

    # --- attention ------------------------------------------------------------------------------------------------

    def qkv_rope(self, x: Sym, layer: AnyLinear, rope: RopeRows, heads: tuple[int, int, int]) -> tuple[Sym, Sym, Sym]:
        """See reference.qkv_rope."""
        num_heads, num_kv_heads, head_dim = heads
        w, packed = self.writer, self.linear(x, layer, "qkv_rope").unflatten(-1, (-1, head_dim))
        q, k, v = (
            w.slice(packed, 2, start, count)
            for start, count in ((0, num_heads), (num_heads, num_kv_heads), (num_heads + num_kv_heads, num_kv_heads))
        )
        return self.rotate(q, rope), self.rotate(k, rope), v

    def kv_rope(self, x: Sym, layer: AnyLinear, rope: RopeRows, heads: tuple[int, int]) -> tuple[Sym, Sym]:
        """See reference.kv_rope."""
        num_kv_heads, head_dim = heads
        k, v = self.linear(x, layer, "kv_rope").unflatten(-1, (2 * num_kv_heads, head_dim)).chunk(2, dim=2)
        return self.rotate(k, rope), v

    def rotate(self, x: Sym, rope: RopeRows) -> Sym:
        """See reference.rotate.  x [B, T, N, d]; cos, sin [B, T, d/2]."""
        w, (cos, sin) = self.writer, rope
        if self.fused:
            turned = w.permute(x, [0, 2, 1, 3])
            add = w.definition.add_rotary_embedding
            layer = add(turned.tensor, cos.tensor, sin.tensor, interleaved=False, rotary_embedding_dim=x.shape[-1])
            return w.permute(w.wrap(layer, x.dtype, "rotate"), [0, 2, 1, 3])
        cos, sin = (table.unflatten(1, (table.shape[1], 1)) for table in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        return w.concat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, q: Sym, k: Sym, v: Sym, mask: None, past: tuple[Sym, Sym] | None, into: AnyLinear) -> Sym:
        """See reference.attention; the mask is the writer's own input."""
        assert mask is None, "a network has its mask as an input"
        w, (B, T, N, head_dim), K = self.writer, q.shape, k.shape[2]
        if past is not None:
            k, v = w.concat([past[0], k.to(past[0].dtype)], 1), w.concat([past[1], v.to(past[1].dtype)], 1)
        q, keys = q * head_dim**-0.5, k.shape[1]
        k, v = w.permute(k, [0, 2, 1, 3]), w.permute(v, [0, 2, 1, 3])
        if self.fused:
            mixed = self._fused(w.permute(q, [0, 2, 1, 3]), k, v, into.name)
            mixed = w.permute(mixed, [0, 2, 1, 3])
        else:
            rows = w.permute(q.unflatten(2, (K, N // K)), [0, 2, 3, 1, 4]).flatten(2, 3)
            scores = w.matmul(rows, k, name=f"attention_scores|{into.name}", transpose=True).float()
            bias = self._bias(keys)
            scores = scores if bias is None else scores + w.reshape(bias, [B, 1, 1, keys])
            mixed = w.matmul(w.softmax(scores).to(v.dtype), v, name=f"attention_mix|{into.name}")
            mixed = w.permute(mixed.unflatten(2, (N // K, T)), [0, 3, 1, 2, 4])
        return self.hand_over(w.reshape(mixed, [B, T, N * head_dim]), into)

    def vision_attention(self, qkv: Sym, num_heads: int, into: AnyLinear) -> Sym:
        """See reference.vision_attention."""
        w, (V, T, packed) = self.writer, qkv.shape
        head_dim = packed // 3 // num_heads
        parts = w.permute(w.reshape(qkv, [V, T, 3, num_heads, head_dim]), [2, 0, 3, 1, 4])
        q, k, v = (parts[index] for index in range(3))
        q = q * head_dim**-0.5
        if self.fused:
            mixed = self._fused(q, k, v, into.name)
        else:
            scores = w.matmul(q, k, name=f"attention_scores|{into.name}", transpose=True).float()
            mixed = w.matmul(w.softmax(scores).to(v.dtype), v, name=f"attention_mix|{into.name}")
        return self.hand_over(w.reshape(w.permute(mixed, [0, 2, 1, 3]), [V, T, packed // 3]), into)

    def _fused(self, q: Sym, k: Sym, v: Sym, name: str) -> Sym:
        """TensorRT's attention layer: q [B, N, T, d] scaled already, as it wants it; k, v [B, K, keys, d].

        Source: TensorRT documentation, "Fused Attention" (no scale of its own; True in a mask = may be seen).
        """
        w, api = self.writer, self.writer.module.api
        kind, arguments = api.AttentionNormalizationOp.SOFTMAX, (q.tensor, k.tensor, v.tensor)
        bias = self._bias(k.shape[2])
        mask = None if bias is None else self._visible(bias, queries=q.shape[2])
        if w.module.offers("attention_v2"):
            layer = w.definition.add_attention_v2(*arguments, kind, api.CausalMaskKind.NONE)
        else:
            layer = w.definition.add_attention(*arguments, kind, False)
        layer.decomposable = True
        if mask is not None:
            layer.mask = mask.tensor
        return w.wrap(layer, q.dtype, f"attention|{name}")

    def _visible(self, bias: Sym, *, queries: int) -> Sym:
        """The mask as TensorRT's attention takes it: bool [B, 1, queries, keys], True = may be seen."""
        w, key = self.writer, ("visible", bias.shape[1], queries)
        if key not in w.known:
            limit = w.constant(torch.full((1, 1, queries, 1), -1.0), name="limit")
            w.known[key] = w.binary("GREATER", w.reshape(bias, [bias.shape[0], 1, 1, bias.shape[1]]), limit)
        return w.known[key]

    def _bias(self, keys: int) -> Sym | None:
        """The additive mask of `keys` keys: the network's mask, then zeros for tokens that everybody sees."""
        if self.mask is None:
            return None
        known, more = self.writer.known, keys - self.mask.shape[1]
        if more == 0:
            return self.mask
        if ("mask", keys) not in known:
            zeros = self.writer.constant(torch.zeros(self.batch, more), name="visible")
            known["mask", keys] = self.writer.concat([self.mask, zeros], 1)
        return known["mask", keys]

    # --- flow -----------------------------------------------------------------------------------------------------

    def step_boundary(
        self, n: Sym, action_out: Linear, x: Sym, dt: float, action_in: Linear, norm: RmsNorm,
        modulation: Sym | None, into: AnyLinear,
    ) -> tuple[Sym, Sym, Sym, Sym]:  # fmt: skip
        """See reference.step_boundary."""
        velocity = self.linear(n, action_out, "step_boundary").float()
        moved = x + velocity * dt
        tokens = self.linear(moved.to(action_in.dtype), action_in, "step_boundary").to(into.dtype)
        return velocity, moved, tokens, self.rms_norm(tokens, norm, modulation, into)


class GivenRows(Rope):
    """A rotary table of which the network is given exactly the rows that it uses: any slice of that many rows is all."""

    __slots__ = ()

    def __new__(cls, cos: Sym, sin: Sym) -> GivenRows:
        """cos, sin [B, T, d/2] of the compute dtype."""
        return super().__new__(cls, cast(Any, (_Rows(cos), _Rows(sin))))


class _Rows:
    def __init__(self, rows: Sym) -> None:
        self.rows = rows

    def __getitem__(self, key: Any) -> Sym:
        """[None, positions] of `transformer.rope_rows`."""
        none, span = key
        assert none is None, key
        assert span.stop - span.start == self.rows.shape[1], (span, self.rows.shape)
        return self.rows
