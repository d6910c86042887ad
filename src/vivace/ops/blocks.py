# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""How a kernel reads blocks of a matrix: through the bulk copy engine where the GPU has one, else by addresses.

Hopper and later copy a block that a descriptor names, return zero outside the matrix, and need no mask. Before Hopper
Triton makes plain loads of a descriptor, of whose alignment it knows nothing: it reads number by number, and no load runs
ahead of the arithmetic (8 KB of shared memory in place of 74 in the loop of a product). There a block is read by addresses.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@functools.cache
def bulk_copies(device: torch.device) -> bool:
    """Whether blocks come through descriptors on this device; Triton's interpreter on a CPU knows them too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def source(matrix: Tensor, block: list[int], *, bulk: bool) -> Any:
    """What `block_of` is handed for a matrix [rows, columns] with any row stride that is a multiple of 16 bytes."""
    return TensorDescriptor.from_tensor(matrix, block) if bulk else matrix


@triton.jit
def block_of(
    matrix, row, column, rows, columns, stride, BULK: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """[R, C] at (row, column); zero outside [rows, columns].  EVEN: no block reaches beyond the last column."""
    if BULK:
        block = matrix.load([row, column])
    else:
        r, c = row + tl.arange(0, R), column + tl.arange(0, C)
        inside = (r < rows)[:, None]
        if not EVEN:
            inside = inside & (c < columns)[None, :]
        block = tl.load(matrix + r[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return block
