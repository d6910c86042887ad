"""Every array of openpi's JAX parameter tree: where it lies, which of our tensors it holds, how a slice becomes [out, in].

Layers are stacked on axis 0; the functions below get one layer's slice, whose axes their docstrings name.
`write_jax.py` runs the same rows backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Transform = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """As stored."""
    return x


def linear(x: Tensor) -> Tensor:
    """[in, out]."""
    return x.T


def conv(x: Tensor) -> Tensor:
    """[patch, patch, 3, out]."""
    return x.permute(3, 2, 0, 1)


def first(x: Tensor) -> Tensor:
    """[1, T, W]."""
    return x[0]


def flat(x: Tensor) -> Tensor:
    """[heads, head_dim]."""
    return x.reshape(-1)


def into_heads(x: Tensor) -> Tensor:
    """[in, heads, head_dim]."""
    return x.reshape(x.shape[0], -1).T


def out_of_heads(x: Tensor) -> Tensor:
    """[heads, head_dim, out]."""
    return x.reshape(-1, x.shape[-1]).T


def query(x: Tensor) -> Tensor:
    """[heads, in, head_dim]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def key(x: Tensor) -> Tensor:
    """[2, kv heads, in, head_dim]."""
    return query(x[0])


def value(x: Tensor) -> Tensor:
    """The other half of `key`."""
    return query(x[1])


def gate(x: Tensor) -> Tensor:
    """[2, in, mlp]."""
    return x[0].T


def up(x: Tensor) -> Tensor:
    """The other half of `gate`."""
    return x[1].T


@dataclass(frozen=True)
class Row:
    """One stored array: its path, the rank of one layer's slice, what it holds."""

    path: str
    rank: int
    holds: tuple[tuple[str, Transform], ...]


def _dense(path: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}/kernel", 2, ((f"{ours}.weight", linear),)),
        Row(f"{path}/bias", 1, ((f"{ours}.bias", same),)),
    )


def _norm(path: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}/scale", 1, ((f"{ours}.weight", same),)),
        Row(f"{path}/bias", 1, ((f"{ours}.bias", same),)),
    )


def _gemma(suffix: str, stack: str) -> tuple[Row, ...]:
    """Rows of one Gemma stack; the prefix's arrays have no suffix, the expert's end in `_1`."""
    layer, ours = "PaliGemma/llm/layers", f"{stack}.layers.{{i}}"
    return (
        Row(f"{layer}/pre_attention_norm{suffix}/scale", 1, ((f"{ours}.norm1.weight", same),)),
        *_dense(f"{layer}/pre_attention_norm{suffix}/Dense_0", f"{ours}.norm1.modulation"),
        Row(f"{layer}/attn/q_einsum{suffix}/w", 3, ((f"{ours}.attn.q.weight", query),)),
        Row(
            f"{layer}/attn/kv_einsum{suffix}/w",
            4,
            ((f"{ours}.attn.k.weight", key), (f"{ours}.attn.v.weight", value)),
        ),
        Row(f"{layer}/attn/attn_vec_einsum{suffix}/w", 3, ((f"{ours}.attn.o.weight", out_of_heads),)),
        Row(f"{layer}/pre_ffw_norm{suffix}/scale", 1, ((f"{ours}.norm2.weight", same),)),
        *_dense(f"{layer}/pre_ffw_norm{suffix}/Dense_0", f"{ours}.norm2.modulation"),
        Row(
            f"{layer}/mlp{suffix}/gating_einsum",
            3,
            ((f"{ours}.mlp.gate.weight", gate), (f"{ours}.mlp.up.weight", up)),
        ),
        Row(f"{layer}/mlp{suffix}/linear", 2, ((f"{ours}.mlp.down.weight", linear),)),
    )


BLOCK, ATTENTION = "PaliGemma/img/Transformer/encoderblock", "MultiHeadDotProductAttention_0"
ROWS: tuple[Row, ...] = (
    Row("PaliGemma/img/embedding/kernel", 4, (("vision.patch.weight", conv),)),
    Row("PaliGemma/img/embedding/bias", 1, (("vision.patch.bias", same),)),
    Row("PaliGemma/img/pos_embedding", 3, (("vision.position.weight", first),)),
    *_norm(f"{BLOCK}/LayerNorm_0", "vision.layers.{i}.norm1"),
    *(
        row
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        for row in (
            Row(f"{BLOCK}/{ATTENTION}/{theirs}/kernel", 3, ((f"vision.layers.{{i}}.attn.{ours}.weight", into_heads),)),
            Row(f"{BLOCK}/{ATTENTION}/{theirs}/bias", 2, ((f"vision.layers.{{i}}.attn.{ours}.bias", flat),)),
        )
    ),
    Row(f"{BLOCK}/{ATTENTION}/out/kernel", 3, (("vision.layers.{i}.attn.o.weight", out_of_heads),)),
    Row(f"{BLOCK}/{ATTENTION}/out/bias", 1, (("vision.layers.{i}.attn.o.bias", same),)),
    *_norm(f"{BLOCK}/LayerNorm_1", "vision.layers.{i}.norm2"),
    *_dense(f"{BLOCK}/MlpBlock_0/Dense_0", "vision.layers.{i}.mlp.fc1"),
    *_dense(f"{BLOCK}/MlpBlock_0/Dense_1", "vision.layers.{i}.mlp.fc2"),
    *_norm("PaliGemma/img/Transformer/encoder_norm", "vision.norm"),
    *_dense("PaliGemma/img/head", "projector"),
    Row("PaliGemma/llm/embedder/input_embedding", 2, (("embedding.weight", same),)),
    *_gemma("", "prefix"),
    *_gemma("_1", "expert"),
    Row("PaliGemma/llm/final_norm_1/scale", 1, (("expert.norm.weight", same),)),
    *_dense("PaliGemma/llm/final_norm_1/Dense_0", "expert.norm.modulation"),
    *(
        row
        for theirs, ours in (
            ("action_in_proj", "action_in"),
            ("action_out_proj", "action_out"),
            ("time_mlp_in", "time_in"),
            ("time_mlp_out", "time_out"),
            ("state_proj", "state"),
            ("action_time_mlp_in", "action_time_in"),
            ("action_time_mlp_out", "action_time_out"),
        )
        for row in _dense(theirs, ours)
    ),
)
DEAD = {"PaliGemma/llm/final_norm/scale": "nothing reads the prefix's final hidden state"}
