"""SigLIP So400m: one 224-pixel view becomes 256 tokens. Views never see each other here, so they are one batch.

The patch convolution has stride = kernel, so it is a linear map of non-overlapping patches; position embeddings are added
in its dtype (float32 in every flavour), and only then is the result rounded to the dtype of the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import VisionConfig
from ..ops.layers import LayerNorm, Linear
from ..ops.table import OpTable


class VisionBlock(nn.Module):
    """Pre-norm transformer block with biases everywhere."""

    def __init__(self, config: VisionConfig, *, name: str) -> None:
        super().__init__()
        D, F = config.width, config.mlp_width
        self.norm1 = LayerNorm(D, name=f"{name}.norm1")
        self.qkv = Linear(D, 3 * D, name=f"{name}.attn.qkv", bias=True)
        self.o = Linear(D, D, name=f"{name}.attn.o", bias=True)
        self.norm2 = LayerNorm(D, name=f"{name}.norm2")
        self.fc1 = Linear(D, F, name=f"{name}.mlp.fc1", bias=True)
        self.fc2 = Linear(F, D, name=f"{name}.mlp.fc2", bias=True)


class Vision(nn.Module):
    """The tower. Projection to the prefix width is `Pi.projector`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = 3 * config.patch_size**2
        self.patch = Linear(patch, config.width, name="vision.patch", bias=True)
        self.position = nn.Parameter(torch.empty(config.tokens, config.width))
        self.layers = nn.ModuleList(VisionBlock(config, name=f"vision.layers.{i}") for i in range(config.layers))
        self.norm = LayerNorm(config.width, name="vision.norm")

    def block(self, index: int) -> VisionBlock:
        """The block at `index`, with its type."""
        block = self.layers[index]
        assert isinstance(block, VisionBlock)
        return block


def encode(vision: Vision, images: Tensor, ops: OpTable, *, into: Linear) -> Tensor:
    """Views to tokens.  images [V, 3, 224, 224] float32 in [-1, 1] or uint8 -> [V, 256, D] after the final norm.

    into  the projector, which reads the tokens
    """
    x = ops.patch_embed(images, vision.patch, vision.position, vision.norm.weight.dtype)
    n = ops.layer_norm(x, vision.block(0).norm1, vision.block(0).qkv)
    for index in range(vision.config.layers):
        block, last = vision.block(index), index + 1 == vision.config.layers
        following = (vision.norm, None, into) if last else _entry(vision.block(index + 1))
        mixed = ops.vision_attention(ops.linear(n, block.qkv), vision.config.num_heads, block.o)
        x, n = ops.linear_residual_norm(mixed, block.o, x, None, block.norm2, None, block.fc1)
        hidden = ops.linear_gelu(n, block.fc1, block.fc2)
        x, n = ops.linear_residual_norm(hidden, block.fc2, x, None, *following)
    return n


def _entry(block: VisionBlock) -> tuple[LayerNorm, None, Linear]:
    return block.norm1, None, block.qkv
