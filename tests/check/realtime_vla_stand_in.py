"""Stands in for the engine of realtime-vla: its constructor, its weights' layout and its `forward`, as formulas in float32.

Written from what its checkpoints mean: matrices [in, out], norms of the prefix folded into them, queries and keys turned in
pairs of neighbours. Copied into a folder as `pi05_infer.py`, so it imports what the engine imports and nothing of vivace.
"""

from typing import ClassVar

import torch
from pi0_infer import VISION_HEADS
from torch.nn import functional
from transformers import AutoTokenizer

assert isinstance(AutoTokenizer, type)


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def turn(x, first):
    """x [T, heads, d]: pairs (0, 1), (2, 3), ... turned by the positions from `first` on."""
    T, _, d = x.shape
    angle = torch.arange(first, first + T)[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def attend(q, k, v):
    """q [T, heads, d] on one key/value head: k, v [S, d]."""
    return (torch.softmax(q.transpose(0, 1) @ k.T * q.shape[-1] ** -0.5, -1) @ v).transpose(0, 1).flatten(1)


class Pi05Inference:
    made: ClassVar[list] = []

    def __init__(self, checkpoint, num_views, chunk_size, *, discrete_state_input=True):
        assert not discrete_state_input
        self.checkpoint, self.num_views, self.chunk_size = checkpoint, num_views, chunk_size
        self.weights = {name: value.float().clone() for name, value in checkpoint.items()}
        self.weights["decoder_action_out_proj_w"] *= -0.1
        self.weights["decoder_action_out_proj_b"] *= -0.1
        self.noise = torch.zeros(chunk_size, 32)
        Pi05Inference.made.append(self)

    def forward(self, images, noise):
        w = self.weights
        assert images.shape[0] == self.num_views
        assert images.shape[-1] == 3
        self.noise.copy_(noise)
        prefix = torch.cat([self.see(images.float()), w["language_embeds"]])
        cache = self.read(prefix)
        for step in range(10):
            self.noise += self.velocity(step, cache, len(prefix))
        return self.noise

    def see(self, images):
        w, (p, _, _, D) = self.weights, self.weights["vision_patch_embedding_w"].shape
        V, g = len(images), images.shape[1] // p
        cut = images.view(V, g, p, g, p, 3).permute(0, 1, 3, 2, 4, 5).reshape(V, g * g, p * p * 3)
        x = cut @ w["vision_patch_embedding_w"].reshape(-1, D) + w["vision_patch_embedding_b"]
        x = x + w["vision_position_embedding"]
        for i in range(len(w["vision_attn_qkv_w"])):
            n = functional.layer_norm(x, (D,), w["vision_pre_attn_norm_w"][i], w["vision_pre_attn_norm_b"][i], 1e-6)
            qkv = (n @ w["vision_attn_qkv_w"][i] + w["vision_attn_qkv_b"][i]).view(V, g * g, 3, VISION_HEADS, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2).flatten(2)
            x = x + mixed @ w["vision_attn_o_w"][i] + w["vision_attn_o_b"][i]
            n = functional.layer_norm(x, (D,), w["vision_pre_ffn_norm_w"][i], w["vision_pre_ffn_norm_b"][i], 1e-6)
            hidden = functional.gelu(n @ w["vision_ffn_up_w"][i] + w["vision_ffn_up_b"][i], approximate="tanh")
            x = x + hidden @ w["vision_ffn_down_w"][i] + w["vision_ffn_down_b"][i]
        n = functional.layer_norm(x, (D,), w["vision_final_norm_w"], w["vision_final_norm_b"], 1e-6)
        return (n @ w["encoder_multi_modal_projector_w"] + w["encoder_multi_modal_projector_b"]).flatten(0, 1)

    def split(self, packed, heads_columns, first):
        d = (packed.shape[1] - heads_columns) // 2
        q, k, v = packed.split([heads_columns, d, d], 1)
        return turn(q.unflatten(1, (-1, d)), first), turn(k[:, None], first)[:, 0], v

    def read(self, x):
        w, cache = self.weights, []
        for i in range(len(w["encoder_attn_qkv_w"])):
            q, k, v = self.split(rms(x) @ w["encoder_attn_qkv_w"][i], w["encoder_attn_o_w"].shape[1], 0)
            cache.append((k, v))
            x = x + attend(q, k, v) @ w["encoder_attn_o_w"][i]
            n = rms(x)
            gated = functional.gelu(n @ w["encoder_ffn_gate_w"][i], approximate="tanh") * (n @ w["encoder_ffn_up_w"][i])
            x = x + gated @ w["encoder_ffn_down_w"][i]
        return cache

    def velocity(self, step, cache, first):
        w, silu = self.weights, functional.silu
        t = silu(w["decoder_time_embeds"][step] @ w["decoder_time_mlp_in_w"] + w["decoder_time_mlp_in_b"])
        t = silu(t @ w["decoder_time_mlp_out_w"] + w["decoder_time_mlp_out_b"])
        x = self.noise @ w["decoder_action_in_proj_w"] + w["decoder_action_in_proj_b"]

        def modulated(x, weight, bias):
            scale, shift, gate = (t @ weight + bias).chunk(3)
            return rms(x) * (1 + scale) + shift, gate

        for i, (keys, values) in enumerate(cache):
            n, gate = modulated(x, w["decoder_pre_attn_norm_mod_w"][i], w["decoder_pre_attn_norm_mod_b"][i])
            q, k, v = self.split(n @ w["decoder_attn_qkv_w"][i], w["decoder_attn_o_w"].shape[1], first)
            mixed = attend(q, torch.cat([keys, k]), torch.cat([values, v]))
            x = x + gate * (mixed @ w["decoder_attn_o_w"][i])
            n, gate = modulated(x, w["decoder_pre_ffn_norm_mod_w"][i], w["decoder_pre_ffn_norm_mod_b"][i])
            gated = functional.gelu(n @ w["decoder_ffn_gate_w"][i], approximate="tanh") * (n @ w["decoder_ffn_up_w"][i])
            x = x + gate * (gated @ w["decoder_ffn_down_w"][i])
        n, _ = modulated(x, w["decoder_final_norm_mod_w"], w["decoder_final_norm_mod_b"])
        return n @ w["decoder_action_out_proj_w"] + w["decoder_action_out_proj_b"]
