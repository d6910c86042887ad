"""Each operation in plain PyTorch: the contract in words and in code.

`into` is the linear that will read the result. An operation returns its result in the format which that layer takes:
the layer's dtype, or E4M3 or INT8 under its static scale. So quantising costs no pass of its own, and the model names no
format. (A layer with row-wise scales takes its dtype, and pays for a pass.)

In float32 these are the formulas. In bfloat16 they round where openpi's PyTorch model rounds (scores to bfloat16 before a
float32 softmax, gelu output, gated branch, residual), so that a bfloat16 policy is the policy that was trained and
served, and not a slightly different one.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .layers import LayerNorm, Linear, QuantisedLinear, RmsNorm, RowFp8Linear

E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-12  # of a row of zeros
NORM_EPS = 1e-6
# openpi's "minus infinity": finite, so that a row without any valid key stays a number (its result is never read)
MASKED_LOGIT = -2.3819763e38
_says_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not a public function
CPU_MULTIPLIES_BFLOAT16: bool = bool(torch.backends.mkldnn.is_available() and _says_bfloat16 and _says_bfloat16())
"""Whether torch has a fast product of bfloat16 matrices on this CPU; else it is a plain loop, far slower than float32."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, in the dtype of x.

    bfloat16 is summed in float32 and rounded once, by every library. So where the CPU has no fast product of it, float32
    copies are multiplied: the same numbers, another order of the sum at most.
    """
    if not _slow(x):
        return functional.linear(x, weight, bias)
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] times b [..., k, n], in the dtype of a; as `_linear`."""
    return torch.matmul(a.float(), b.float()).to(a.dtype) if _slow(a) else torch.matmul(a, b)


def _slow(x: Tensor) -> bool:
    return not CPU_MULTIPLIES_BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def hand_over(x: Tensor, into: Linear | QuantisedLinear) -> Tensor:
    """x in the format that `into` takes; out-of-range values saturate. An x that is in that format already stays."""
    if not isinstance(into, QuantisedLinear) or isinstance(into, RowFp8Linear):
        return x.to(into.dtype)
    return x if x.dtype == into.stored else round_to(x.float() / into.input_scale, into.stored)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> E4M3 or INT8: the nearest number, of two the even one; saturates at 448, or at -128 and 127."""
    if dtype == torch.int8:
        return x.round().clamp(-128.0, 127.0).to(torch.int8)
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def rows_to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (E4M3 [..., K], float32 scales [..., 1]): the largest |x| of a row lands on 448. A NaN stays one."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    return round_to(wide / scales, torch.float8_e4m3fn), scales


def patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut views into rows of pixels.  images [V, 3, h, w] -> [V, (h/p)*(w/p), 3*p*p], row-major over patches."""
    return functional.unfold(images, kernel_size=patch_size, stride=patch_size).transpose(1, 2)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1] as value/255*2-1; float32 passes through unchanged."""
    return images.float() / 255.0 * 2.0 - 1.0 if images.dtype == torch.uint8 else images


def patch_embed(images: Tensor, layer: Linear, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels to tokens: a convolution with stride = kernel is a linear map of patches; positions are added, then rounded.

    images    [V, 3, s, s], float32 in [-1, 1] or uint8        layer  weight [D, 3 p p]        position [(s/p)^2, D]
    returns   [V, (s/p)^2, D] in `dtype`; the product and the sum are in the layer's dtype (float32 in every flavour)
    """
    patch_size = math.isqrt(layer.weight.shape[1] // 3)
    pixels = patches(to_unit_range(images), patch_size)
    return (linear(pixels.to(layer.dtype), layer) + position).to(dtype)


def layer_norm(x: Tensor, norm: LayerNorm, into: Linear | QuantisedLinear) -> Tensor:
    """Standardise the last axis, then scale and shift.  x [..., D] -> [..., D]; statistics float32."""
    return hand_over(functional.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, NORM_EPS), into)


def rms_norm(x: Tensor, norm: RmsNorm, modulation: Tensor | None, into: Linear | QuantisedLinear) -> Tensor:
    """Divide by the root mean square, then apply a learned gain or the flow-time modulation.

    x           [B, T, D]
    modulation  None, or float32 [1 or T, 3D] = scale | shift | gate; the gate is for `linear_residual_norm`
    returns     [B, T, D], as `into` takes it

    Numerics: everything float32, rounded once to the dtype of x.
    Source:   openpi models/gemma.py, RMSNorm with and without condition.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    if modulation is not None:
        scale, shift, _ = modulation.chunk(3, dim=-1)
        return hand_over((normed * (1.0 + scale) + shift).to(x.dtype), into)
    assert norm.weight is not None, f"{norm.name} has no weight and was given no modulation"
    return hand_over((normed * (1.0 + norm.weight.float())).to(x.dtype), into)


def linear(x: Tensor, layer: Linear | QuantisedLinear) -> Tensor:
    """x [..., in], as `layer` takes it -> [..., out] in `layer.dtype`. Quantised: products and sums float32, one rounding.

    Kernels round once too, but their sums over E4M3 operands are those of the matrix unit, which on Hopper keeps fewer bits
    than float32 while it adds (cuBLASLt with `use_fast_accum`, Triton and Gluon alike). A product may differ by 1e-3,
    relative L2 (tests/ops/test_denoise_ahead_gpu.py). Measured on an H100 with random weights, error against float32:
    0.08 to 0.17 with the kernels, 0.08 to 0.16 with this reference (docs/log.md, 2026-11-24 and -25).
    """
    if not isinstance(layer, QuantisedLinear):
        return _linear(x, layer.weight, layer.bias)
    rows, scale = rows_to_e4m3(x) if isinstance(layer, RowFp8Linear) else (hand_over(x, layer), layer.input_scale)
    wide = functional.linear(rows.float(), layer.weight.float()) * (scale * layer.weight_scale)
    return (wide if layer.bias is None else wide + layer.bias.float()).to(layer.dtype)


def linear_gelu(x: Tensor, layer: Linear | QuantisedLinear, into: Linear | QuantisedLinear) -> Tensor:
    """Linear, then tanh-approximated GELU (SigLIP's fc1)."""
    return hand_over(functional.gelu(linear(x, layer), approximate="tanh"), into)


def linear_residual_norm(
    x: Tensor,
    layer: Linear | QuantisedLinear,
    residual: Tensor,
    gate: Tensor | None,
    norm: RmsNorm | LayerNorm,
    modulation: Tensor | None,
    into: Linear | QuantisedLinear,
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the beginning of the next: s = residual + gate * layer(x), and norm(s) for `into`.

    x [B, T, in]    residual [B, T, D]    gate [1 or T, D] or None    modulation as in `rms_norm`
    returns (s [B, T, D], in the dtype of residual or wider; norm(s) [B, T, D] as `into` takes it)

    The cut lies here, not before the norm, so that a kernel can sum the parts of a split product inside the norm, in a
    fixed order. Numerics: the product is rounded to the residual's dtype before the sum, as openpi does.
    """
    branch = linear(x, layer)
    if gate is not None:
        branch = branch * gate.to(branch.dtype)
    total = residual + branch
    if isinstance(norm, LayerNorm):
        return total, layer_norm(total, norm, into)
    return total, rms_norm(total, norm, modulation, into)


def geglu(x: Tensor, layer: Linear | QuantisedLinear, into: Linear | QuantisedLinear) -> Tensor:
    """gelu_tanh(gate) * up, both from one packed linear.  layer.weight [2F, D] = gate rows | up rows; returns [..., F]."""
    gate, up = linear(x, layer).chunk(2, dim=-1)
    return hand_over(functional.gelu(gate, approximate="tanh") * up, into)


def rotate(x: Float[Tensor, "B T N d"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "B T N d"]:
    """Rotary embedding, half-split convention.  x [B, T, N, head_dim]; cos, sin [B or 1, T, head_dim/2] in x's dtype."""
    cos, sin = (table.unsqueeze(2) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def qkv_rope(
    x: Tensor, layer: Linear | QuantisedLinear, rope: tuple[Tensor, Tensor], heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Project to queries, keys and values; rotate queries and keys.

    x      [B, T, D]
    layer  weight [(N + 2K) * head_dim, D] = q rows | k rows | v rows
    heads  (N query heads, K key/value heads, head_dim)
    returns q [B, T, N, head_dim], k and v [B, T, K, head_dim]
    """
    num_heads, num_kv_heads, head_dim = heads
    packed = linear(x, layer).unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = packed.split([num_heads, num_kv_heads, num_kv_heads], dim=-2)
    return rotate(q, rope), rotate(k, rope), v


def kv_rope(
    x: Tensor, layer: Linear | QuantisedLinear, rope: tuple[Tensor, Tensor], heads: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Keys and values alone: all that is needed of a last layer.  layer.weight [2K * head_dim, D] = k rows | v rows."""
    num_kv_heads, head_dim = heads
    packed = linear(x, layer).unflatten(-1, (2 * num_kv_heads, head_dim))
    k, v = packed.split([num_kv_heads, num_kv_heads], dim=-2)
    return rotate(k, rope), v


def attention(
    q: Float[Tensor, "B T N d"],
    k: Float[Tensor, "B T K d"],
    v: Float[Tensor, "B T K d"],
    mask: Bool[Tensor, "B keys"] | None,
    past: tuple[Float[Tensor, "B S K d"], Float[Tensor, "B S K d"]] | None,
    into: Linear | QuantisedLinear,
) -> Tensor:
    """Grouped-query attention; the queries of one key/value head are stacked into rows, so K and V are never repeated.

    q     [B, T, N, head_dim]      k, v  [B, T, K, head_dim] of the same tokens
    past  keys and values of the prefix, [B, S, K, head_dim] each, seen before the own ones; None = there is no past
    mask  bool [B, keys], True = may be seen; None = all
    returns [B, T, N * head_dim], as `into` takes it

    Numerics: scores rounded to the compute dtype, softmax float32, probabilities rounded back (openpi's eager attention).
    """
    B, T, N, head_dim = q.shape
    K = k.shape[2]
    if past is not None:
        k, v = torch.cat([past[0], k.to(past[0].dtype)], dim=1), torch.cat([past[1], v.to(past[1].dtype)], dim=1)
    rows = q.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).reshape(B, K, (N // K) * T, head_dim)
    scores = _matmul(rows, k.permute(0, 2, 3, 1)) * head_dim**-0.5
    scores = scores.float().unflatten(2, (N // K, T))
    if mask is not None:
        scores = torch.where(mask[:, None, None, None, :], scores, MASKED_LOGIT)
    probabilities = torch.softmax(scores, dim=-1).to(v.dtype).flatten(2, 3)
    mixed = _matmul(probabilities, v.permute(0, 2, 1, 3)).unflatten(2, (N // K, T))
    return hand_over(mixed.permute(0, 3, 1, 2, 4).reshape(B, T, N * head_dim), into)


def vision_attention(qkv: Tensor, num_heads: int, into: Linear | QuantisedLinear) -> Tensor:
    """Full self-attention of one view.  qkv [V, T, 3D] = q | k | v -> [V, T, D]; torch's own SDPA, as the originals use."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return hand_over(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), into)


def step_boundary(
    n: Float[Tensor, "B T D"],
    action_out: Linear,
    x: Float[Tensor, "B T A"],
    dt: float,
    action_in: Linear,
    norm: RmsNorm,
    modulation: Tensor | None,
    into: Linear | QuantisedLinear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The end of one Euler step and the beginning of the next: v = action_out(n), x' = x + dt v, tokens = action_in(x').

    n           [B, T, D], the final norm as `action_out` takes it
    x           float32 [B, T, 32], the noisy actions of this step
    modulation  of the first norm in the next step, as in `rms_norm`
    returns     v and x' float32 [B, T, 32], tokens [B, T, D] in into.dtype, norm(tokens) as `into` takes it
    """
    velocity = linear(n, action_out).float()
    moved = torch.add(x, velocity, alpha=dt)
    tokens = linear(moved.to(action_in.dtype), action_in).to(into.dtype)
    return velocity, moved, tokens, rms_norm(tokens, norm, modulation, into)
