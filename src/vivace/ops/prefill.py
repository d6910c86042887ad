"""The operations of the prefill on an NVIDIA GPU: an OpTable for 256 to 1,024 rows, in bfloat16, E4M3 and INT8.

Every product has two ways to run, and `prefill_tuning` says which measurement chose one per shape and number of rows:

    triton   `prefill_gemm`: the epilogue does GELU, GeGLU, rotary embedding, biases and scales
    blas     cuBLASLt through torch, then one row-wise kernel for what is left; not for INT8

The table is made for one model: the constants of its 8-bit layers (input scale times weight scale per channel, inverse
input scales) are computed here once, so a captured graph holds none of that arithmetic. Nothing falls back: what cannot
run is named by `why_not` before, and by Unsupported if it is asked for all the same. What is torch's own by design
(float32 linears, the boundary of two steps, which is the denoise kernels' affair) is recorded as "torch".

E4M3 sums: cuBLASLt (`use_fast_accum`) and Triton's products on Hopper both add in the matrix unit's own accumulator, which
keeps fewer bits than float32; `reference.linear` says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError, Unsupported
from . import launch, prefill_attention, prefill_patches, prefill_pointwise, prefill_tail, reference, row_scales
from .layers import AnyLinear, E4m3Linear, Int8Linear, LayerNorm, Linear, QuantisedLinear, RmsNorm, StaticLinear
from .prefill_ahead import Ahead, worth
from .prefill_constants import Constants, constants_of
from .prefill_gemm import Rotation, gemm
from .prefill_limits import refuse_modulation, refuse_step, why_not, why_not_head, why_not_vision_head
from .prefill_operand import Operand, blas
from .prefill_tuning import TUNED, Choice, Tuning, tuning_for, untuned
from .table import OpTable

Recorder = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Prefill:
    """The operations as methods; `prefill_ops` puts them into a table. Contracts: `ops.reference`.

    ones        float32 [rows, 1]: the row scales that cuBLAS asks for beside channel scales; more rows make their own
    kv_buffers  {layer name: (k, v)}, each [M, K * head_dim] with any row stride: where that layer's keys and values go
    early       layers and norms whose names begin so are launched while the kernel before still runs (from Hopper on)
    patch_parts dtype that holds the parts of pixels and patch weights; float32 in Triton's interpreter
    patches     constants of `patch_embed`, filled by its first call
    record      called with (layer, operation, kernel) whenever a kernel is launched
    """

    constants: Mapping[str, Constants]
    ones: Tensor
    tuning: Tuning = TUNED
    kv_buffers: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    record: Recorder | None = None
    early: tuple[str, ...] = ()
    processors: int = 132
    patch_parts: torch.dtype = torch.bfloat16
    patches: dict[tuple[str, bool], prefill_patches.PatchWeights] = field(default_factory=dict)

    # --- pixels ---------------------------------------------------------------------------------------------------

    def patch_embed(self, images: Tensor, layer: Linear, position: Tensor, dtype: torch.dtype) -> Tensor:
        """`reference.patch_embed`; its constants are made at the first call for a pixel type (so before any capture)."""
        if layer.dtype != torch.float32 or layer.bias is None:
            raise Unsupported("patches are float32 with a bias", got=layer.dtype, do="use the reference operation")
        key = layer.name, images.dtype == torch.uint8
        if key not in self.patches:
            self.patches[key] = prefill_patches.patch_weights(
                layer.weight, layer.bias, position, uint8=key[1], dtype=self.patch_parts
            )
        self._note(layer.name, "patch_embed", "triton")
        tile, early = self.tuning.patch_tile, self._early(layer.name)
        return prefill_patches.patch_embed(images.contiguous(), self.patches[key], dtype=dtype, tile=tile, pdl=early)

    # --- norms ----------------------------------------------------------------------------------------------------

    def layer_norm(self, x: Tensor, norm: LayerNorm, into: AnyLinear) -> Tensor:
        """`reference.layer_norm`."""
        return self._norm(x, norm, into)

    def rms_norm(self, x: Tensor, norm: RmsNorm, modulation: Tensor | None, into: AnyLinear) -> Tensor:
        """`reference.rms_norm` without modulation."""
        refuse_modulation(modulation, norm.name, x)
        return self._norm(x, norm, into)

    def linear_residual_norm(
        self,
        x: Tensor,
        layer: AnyLinear,
        residual: Tensor,
        gate: Tensor | None,
        norm: RmsNorm | LayerNorm,
        modulation: Tensor | None,
        into: AnyLinear,
    ) -> tuple[Tensor, Tensor]:
        """`reference.linear_residual_norm` without gate and modulation; parts of a split product meet inside the norm."""
        refuse_modulation(gate, layer.name, x)
        refuse_modulation(modulation, norm.name, x)
        given, old = self._operand(x, layer, "linear_residual_norm"), residual.flatten(0, -2).contiguous()
        choice, left = self._choose("parts", layer, given, "linear_residual_norm"), given.channel
        if choice.tile is None:
            product, left = self._blas(given, layer)
            parts = product[None]
        else:
            split = choice.tile.split_k
            dtype = layer.dtype if split == 1 else torch.float32
            parts = torch.empty(split, old.shape[0], layer.weight.shape[0], dtype=dtype, device=x.device)
            gemm(
                given.rows, layer.weight, parts[0] if split == 1 else parts, tile=choice.tile, row_scale=given.own,
                processors=self.processors, pdl=self._early(layer.name),
            )  # fmt: skip
        total, out = torch.empty_like(old), self._for(into, old, old.shape[1])
        prefill_pointwise.residual_norm(
            old, _gain(norm), out, shift=_shift(norm), parts=parts, channel_scale=left, bias=layer.bias,
            total=total, out_inverse=self._inverse(into), pdl=self._early(layer.name), ahead=self._ahead(into),
        )  # fmt: skip
        return total.view(residual.shape), out.view(residual.shape)

    def _norm(self, x: Tensor, norm: RmsNorm | LayerNorm, into: AnyLinear) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        out = self._for(into, rows, rows.shape[1])
        self._note(norm.name, "layer_norm" if isinstance(norm, LayerNorm) else "rms_norm", "triton")
        prefill_pointwise.residual_norm(
            rows, _gain(norm), out, shift=_shift(norm), out_inverse=self._inverse(into), pdl=self._early(norm.name),
            ahead=self._ahead(into),
        )  # fmt: skip
        return out.view(x.shape)

    # --- products -------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, layer: AnyLinear) -> Tensor:
        """`reference.linear`; float32 layers (time, actions, state) are torch's own linear."""
        if layer.dtype == torch.float32:
            self._note(layer.name, "linear", "torch")
            return functional.linear(x, layer.weight, layer.bias)
        given = self._operand(x, layer, "linear")
        choice = self._choose("plain", layer, given, "linear")
        if choice.tile is None:
            return self._blas(given, layer, finished=True)[0].view(*x.shape[:-1], -1)
        out = prefill_pointwise.new_rows(given.rows, layer.weight.shape[0], layer.dtype)
        gemm(
            given.rows, layer.weight, out, tile=choice.tile, channel_scale=given.channel, row_scale=given.own,
            bias=layer.bias, processors=self.processors, pdl=self._early(layer.name),
        )  # fmt: skip
        return out.view(*x.shape[:-1], -1)

    def linear_gelu(self, x: Tensor, layer: AnyLinear, into: AnyLinear) -> Tensor:
        """`reference.linear_gelu`."""
        given = self._operand(x, layer, "linear_gelu")
        # cuBLAS' GELU epilogue takes and gives bfloat16, and wants a bias
        bias = layer.bias
        plain = bias is not None and not isinstance(layer, QuantisedLinear) and not isinstance(into, StaticLinear)
        choice = self._choose("gelu", layer, given, "linear_gelu", blas_can=plain)
        if choice.tile is None:
            assert bias is not None, layer.name
            done: Tensor = torch._addmm_activation(bias, given.rows, layer.weight.t(), use_gelu=True)
            return done.view(*x.shape[:-1], -1)
        out = self._for(into, given.rows, layer.weight.shape[0])
        gemm(
            given.rows, layer.weight, out, tile=choice.tile, channel_scale=given.channel, row_scale=given.own, bias=bias,
            gelu=True, out_inverse=self._inverse(into), processors=self.processors, pdl=self._early(layer.name),
            ahead=self._ahead(into),
        )  # fmt: skip
        return out.view(*x.shape[:-1], -1)

    def geglu(self, x: Tensor, layer: AnyLinear, into: AnyLinear) -> Tensor:
        """`reference.geglu`."""
        given = self._operand(x, layer, "geglu")
        choice = self._choose("geglu", layer, given, "geglu")
        out, inverse = self._for(into, given.rows, layer.weight.shape[0] // 2), self._inverse(into)
        if choice.tile is None:
            packed, left = self._blas(given, layer)
            prefill_pointwise.geglu(packed, out, channel_scale=left, out_inverse=inverse, pdl=self._early(layer.name))
        else:
            prefill_tail.gated(
                given.rows, layer.weight, out, tile=choice.tile, channel_scale=given.channel, row_scale=given.own,
                out_inverse=inverse, processors=self.processors, pdl=self._early(layer.name),
            )  # fmt: skip
        return out.view(*x.shape[:-1], -1)

    def qkv_rope(
        self, x: Tensor, layer: AnyLinear, rope: tuple[Tensor, Tensor], heads: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reference.qkv_rope`; keys and values go to this layer's `kv_buffers` if there are some."""
        given = self._operand(x, layer, "qkv_rope")
        num_heads, _, head_dim = heads
        q = prefill_pointwise.new_rows(given.rows, num_heads * head_dim, layer.dtype)
        k, v = self._rotated(given, layer, rope, heads, q)
        B, T = x.shape[:2]
        return q.view(B, T, num_heads, head_dim), _headed(k, B, heads), _headed(v, B, heads)

    def kv_rope(
        self, x: Tensor, layer: AnyLinear, rope: tuple[Tensor, Tensor], heads: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """`reference.kv_rope`; keys and values as in `qkv_rope`."""
        k, v = self._rotated(self._operand(x, layer, "kv_rope"), layer, rope, (0, *heads), None)
        return _headed(k, x.shape[0], (0, *heads)), _headed(v, x.shape[0], (0, *heads))

    def _rotated(
        self,
        given: Operand,
        layer: AnyLinear,
        rope: tuple[Tensor, Tensor],
        heads: tuple[int, int, int],
        q: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        columns = heads[1] * heads[2]
        if layer.name in self.kv_buffers:
            k, v = self.kv_buffers[layer.name]
        else:
            k, v = (prefill_pointwise.new_rows(given.rows, columns, layer.dtype) for _ in range(2))
        cos, sin = (table.reshape(-1, table.shape[-1]).contiguous() for table in rope)
        choice = self._choose("qkv_rope", layer, given, "kv_rope" if q is None else "qkv_rope")
        if choice.tile is None:
            packed, left = self._blas(given, layer)
            prefill_pointwise.rope_split(
                packed, q, k, v, tables=(cos, sin), heads=heads, channel_scale=left, pdl=self._early(layer.name)
            )
        else:
            gemm(
                given.rows, layer.weight, k if q is None else q, tile=choice.tile, epilogue="qkv_rope",
                channel_scale=given.channel, row_scale=given.own,
                rotation=Rotation(k=k, v=v, cos=cos, sin=sin, heads=heads),
                processors=self.processors, pdl=self._early(layer.name),
            )  # fmt: skip
        return k, v

    # --- attention ------------------------------------------------------------------------------------------------

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        into: AnyLinear,
    ) -> Tensor:
        """`reference.attention`; a past (pi0's state token, one row) is first joined with the own keys."""
        B, T, N, head_dim = q.shape
        if reason := why_not_head(head_dim):
            raise Unsupported("no prefill attention", got=reason, do="choose --backend eager or compiled")
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        out = self._for(into, q.flatten(0, 1), N * head_dim).view(B, T, N * head_dim)
        self._note(into.name, "attention", "triton")
        return prefill_attention.attention(
            q, k, v, out, tile=self.tuning.attention_tile(rows=T * N), mask=mask, out_inverse=self._inverse(into),
            pdl=self._early(into.name), ahead=self._ahead(into),
        )  # fmt: skip

    def vision_attention(self, qkv: Tensor, num_heads: int, into: AnyLinear) -> Tensor:
        """`reference.vision_attention`, head dims of `prefill_limits.why_not_vision_head`."""
        V, T, packed = qkv.shape
        if reason := why_not_vision_head(packed // 3, num_heads):
            raise Unsupported("no vision attention", got=reason, do="choose --backend eager or compiled")
        out = self._for(into, qkv.flatten(0, 1), packed // 3).view(V, T, packed // 3)
        self._note(into.name, "vision_attention", "triton")
        return prefill_attention.vision_attention(
            qkv, out, heads=num_heads, tile=self.tuning.vision_tile, out_inverse=self._inverse(into),
            pdl=self._early(into.name), ahead=self._ahead(into),
        )  # fmt: skip

    # --- parts ----------------------------------------------------------------------------------------------------

    def _choose(
        self, epilogue: str, layer: AnyLinear, given: Operand, operation: str, *, blas_can: bool = True
    ) -> Choice:
        """The tuned way to run this product, noted for coverage."""
        fp8, shape = isinstance(layer, E4m3Linear), tuple(layer.weight.shape)
        if isinstance(layer, Int8Linear):
            choice = self.tuning.choose_int8(
                epilogue, rows=given.rows.shape[0], shape=shape, processors=self.processors
            )
        else:
            choice = self.tuning.choose(epilogue, rows=given.rows.shape[0], shape=shape, fp8=fp8)
        if choice.tile is None and not blas_can:
            choice = untuned(epilogue, fp8=fp8)  # Triton's
        kernel = "cublas" if choice.tile is None else "triton"
        self._note(layer.name, operation, kernel if choice.measured else f"{kernel}, untuned")
        return choice

    def _ahead(self, into: AnyLinear) -> Ahead:
        return worth(into.weight, self.tuning.ahead_bytes)

    def _early(self, name: str) -> bool:
        return name.startswith(self.early)

    def _note(self, layer: str, operation: str, kernel: str) -> None:
        if self.record is not None:
            self.record(layer, operation, kernel)

    def _operand(self, x: Tensor, layer: AnyLinear, operation: str) -> Operand:
        """x [..., K] as what the product of `layer` reads."""
        wanted = _format(layer)
        if x.dtype != wanted:
            raise ShapeError(f"{layer.name} was handed another format", got=x.dtype, wanted=wanted)
        refuse_step(layer, x)
        rows, own = row_scales.operand(x.flatten(0, -2).contiguous(), layer, pdl=self._early(layer.name))
        if own is not None:
            self._note(layer.name, operation, row_scales.KERNEL)
        return Operand(rows, self.constants[layer.name].channel if isinstance(layer, QuantisedLinear) else None, own)

    def _blas(self, given: Operand, layer: AnyLinear, *, finished: bool = False) -> tuple[Tensor, Tensor | None]:
        return blas(given, layer, ones=self.ones, finished=finished)

    def step_boundary(
        self, n: Tensor, action_out: Linear, x: Tensor, dt: float, action_in: Linear, norm: RmsNorm,
        modulation: Tensor | None, into: AnyLinear,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`reference.step_boundary` itself."""
        self._note(action_out.name, "step_boundary", "torch")
        return reference.step_boundary(n, action_out, x, dt, action_in, norm, modulation, into)

    def _inverse(self, into: AnyLinear) -> Tensor | None:
        return self.constants[into.name].inverse if isinstance(into, StaticLinear) else None

    def _for(self, into: AnyLinear, like: Tensor, columns: int) -> Tensor:
        return prefill_pointwise.new_rows(like, columns, _format(into))


def prefill_ops(
    model: nn.Module,
    *,
    tuning: Tuning | None = None,
    kv_buffers: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    record: Recorder | None = None,
    most_rows: int = 8192,
) -> OpTable:
    """The table for `model`'s vision tower and prefix. Constants of 8-bit layers are computed now.

    tuning     None: what `prefill_tuning.tuning_for` says of this GPU
    most_rows  rows for which the row scales of E4M3 products are made once
    Raises     Unsupported with the reason of `why_not`
    """
    device = next(model.parameters()).device
    if reason := why_not(device=str(device), model=model):
        raise Unsupported("the prefill kernels cannot run", got=reason, do="choose another --backend")
    properties = torch.cuda.get_device_properties(device)
    if tuning is None:
        tuning = tuning_for((properties.major, properties.minor), shared_bytes=launch.shared_bytes(device))
    ops = Prefill(
        constants=constants_of(model),
        ones=torch.ones(most_rows, 1, dtype=torch.float32, device=device),
        tuning=tuning,
        kv_buffers=kv_buffers or {},
        record=record,
        early=tuning.early if properties.major >= 9 else (),
        processors=properties.multi_processor_count,
    )
    return table_of(ops)


def table_of(ops: Prefill) -> OpTable:
    """The methods of `ops` as an operation table."""
    return OpTable(
        patch_embed=ops.patch_embed,
        layer_norm=ops.layer_norm,
        rms_norm=ops.rms_norm,
        linear=ops.linear,
        linear_gelu=ops.linear_gelu,
        linear_residual_norm=ops.linear_residual_norm,
        geglu=ops.geglu,
        qkv_rope=ops.qkv_rope,
        kv_rope=ops.kv_rope,
        attention=ops.attention,
        vision_attention=ops.vision_attention,
        step_boundary=ops.step_boundary,
    )


def _format(layer: AnyLinear) -> torch.dtype:
    """In which its input is handed to it."""
    return layer.stored if isinstance(layer, StaticLinear) else layer.dtype


def _gain(norm: RmsNorm | LayerNorm) -> Tensor:
    assert norm.weight is not None, f"{norm.name} has no weight and was given no modulation"
    gain: Tensor = norm.weight
    return gain


def _shift(norm: RmsNorm | LayerNorm) -> Tensor | None:
    if not isinstance(norm, LayerNorm):
        return None
    shift: Tensor = norm.bias
    return shift


def _headed(rows: Tensor, batch: int, heads: tuple[int, int, int]) -> Tensor:
    """[M, K * d] of any row stride as [B, T, K, d]."""
    headed: Tensor = rows.unflatten(0, (batch, -1)).unflatten(-1, (heads[1], heads[2]))
    return headed
