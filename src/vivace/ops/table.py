"""The operations that the model is made of, cut where a GPU kernel can fuse.

The model calls only these. A backend may replace any of them by a kernel with the same contract; `reference_ops()` is
what each must agree with. If a fusion does not fit this cut, the cut moves for everybody.

Where a product or a norm feeds a linear, that linear is passed as `into`: the operation stores its result in the format
which `into` takes (bfloat16, float32, or 8 bits under a static scale), so a precision plan needs no word in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .layers import AnyLinear, LayerNorm, Linear, RmsNorm

AnyNorm = RmsNorm | LayerNorm
Table = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class OpTable:
    """One callable per operation; contracts and numerics in `ops.reference`. `dataclasses.replace` swaps some of them."""

    patch_embed: Callable[[Tensor, Linear, Tensor, torch.dtype], Tensor]
    layer_norm: Callable[[Tensor, LayerNorm, AnyLinear], Tensor]
    rms_norm: Callable[[Tensor, RmsNorm, Tensor | None, AnyLinear], Tensor]
    linear: Callable[[Tensor, AnyLinear], Tensor]
    linear_gelu: Callable[[Tensor, AnyLinear, AnyLinear], Tensor]
    linear_residual_norm: Callable[
        [Tensor, AnyLinear, Tensor, Tensor | None, AnyNorm, Tensor | None, AnyLinear], tuple[Tensor, Tensor]
    ]
    geglu: Callable[[Tensor, AnyLinear, AnyLinear], Tensor]
    qkv_rope: Callable[[Tensor, AnyLinear, Table, tuple[int, int, int]], tuple[Tensor, Tensor, Tensor]]
    kv_rope: Callable[[Tensor, AnyLinear, Table, tuple[int, int]], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, Table | None, AnyLinear], Tensor]
    vision_attention: Callable[[Tensor, int, AnyLinear], Tensor]
    step_boundary: Callable[
        [Tensor, Linear, Tensor, float, Linear, RmsNorm, Tensor | None, AnyLinear],
        tuple[Tensor, Tensor, Tensor, Tensor],
    ]


def reference_ops() -> OpTable:
    """The plain PyTorch operations: the definition, and the fallback that a caller may name."""
    return OpTable(
        patch_embed=reference.patch_embed,
        layer_norm=reference.layer_norm,
        rms_norm=reference.rms_norm,
        linear=reference.linear,
        linear_gelu=reference.linear_gelu,
        linear_residual_norm=reference.linear_residual_norm,
        geglu=reference.geglu,
        qkv_rope=reference.qkv_rope,
        kv_rope=reference.kv_rope,
        attention=reference.attention,
        vision_attention=reference.vision_attention,
        step_boundary=reference.step_boundary,
    )
