# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Weights of the next product, fetched into L2 by a kernel that leaves memory idle.

A product of few rows waits for its weights: at 256 rows a SigLIP layer reads 30 MB, 9 us of its 48. But weights are
constants and known before; a norm or an attention that runs first can ask for them. It is a hint: no result depends on it,
and nothing waits for it. Each program asks for its share of cache lines, before it waits for the kernel in front of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Ahead = Tensor | None
LINE_BYTES = 128


@triton.jit
def fetch_ahead(ahead, ahead_bytes, turns, LINES: tl.constexpr):
    """Ask for turns * LINES cache lines per program; `ahead` points to 32-bit words."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for turn in range(turns):
        byte = ((turn * programs + program) * LINES + tl.arange(0, LINES)) * 128
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [ahead + byte // 4, byte, ahead_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def worth(weight: Tensor, most_bytes: int) -> Ahead:
    """The weight if it is no larger than `most_bytes`: a larger one would push out what the next product needs first."""
    return weight if weight.numel() * weight.element_size() <= most_bytes and weight.is_contiguous() else None


def ahead_options(ahead: Ahead, *, programs: int, warps: int) -> dict[str, Any]:
    """Launch keywords of a kernel that may fetch: nothing to fetch without a weight, or in Triton's interpreter."""
    if ahead is None or not ahead.is_cuda:
        return {"ahead": None, "ahead_bytes": 0, "ahead_turns": 0, "AHEAD_LINES": 0}
    size, lines = ahead.numel() * ahead.element_size(), 32 * warps
    turns = triton.cdiv(size, programs * lines * LINE_BYTES)
    return {"ahead": ahead.view(torch.int32), "ahead_bytes": size, "ahead_turns": turns, "AHEAD_LINES": lines}
