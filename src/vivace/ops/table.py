"""The operations that the model is made of, cut where a GPU kernel can fuse.

The model calls only these. A backend may replace any of them by a kernel with the same contract; `reference_ops()` is
what each must agree with. If a fusion does not fit this cut, the cut moves for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import reference
from .layers import LayerNorm, Linear, RmsNorm


@dataclass(frozen=True)
class OpTable:
    """One callable per operation; contracts and numerics in `ops.reference`."""

    layer_norm: Callable[[Tensor, LayerNorm], Tensor]
    rms_norm: Callable[[Tensor, RmsNorm, Tensor | None], Tensor]
    linear: Callable[[Tensor, Linear], Tensor]
    linear_gelu: Callable[[Tensor, Linear], Tensor]
    linear_residual: Callable[[Tensor, Linear, Tensor, Tensor | None], Tensor]
    geglu: Callable[[Tensor, Linear], Tensor]
    qkv_rope: Callable[[Tensor, Linear, tuple[Tensor, Tensor], tuple[int, int, int]], tuple[Tensor, Tensor, Tensor]]
    kv_rope: Callable[[Tensor, Linear, tuple[Tensor, Tensor], tuple[int, int]], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None], Tensor]
    vision_attention: Callable[[Tensor, int], Tensor]


def reference_ops() -> OpTable:
    """The plain PyTorch operations: the definition, and the fallback that a caller may name."""
    return OpTable(
        layer_norm=reference.layer_norm,
        rms_norm=reference.rms_norm,
        linear=reference.linear,
        linear_gelu=reference.linear_gelu,
        linear_residual=reference.linear_residual,
        geglu=reference.geglu,
        qkv_rope=reference.qkv_rope,
        kv_rope=reference.kv_rope,
        attention=reference.attention,
        vision_attention=reference.vision_attention,
    )
