"""pi0 / pi0.5 written down once more, literally and slowly, as an independent oracle.

Nothing is compacted, packed, pruned or precomputed here: padded tokens and missing views stay in behind a mask, all prefix
layers run whole, the state token is part of every suffix, the time MLP runs in every step. It shares no code with
`vivace.model`. `mistake=` plants one named error, so that a test can show that its comparison would see it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Case:
    """Inputs with padding, as the original software runs them."""

    images: Tensor  # [B, V, 3, 224, 224]
    view_mask: Tensor  # [B, V]
    tokens: Tensor  # [B, L]
    token_mask: Tensor  # [B, L]
    state: Tensor  # [B, 32]
    noise: Tensor  # [B, H, 32]


class Literal:
    """Runs from a table of unpacked tensors (vivace's checkpoint names)."""

    def __init__(self, config, tensors: dict[str, Tensor], mistake: str = "") -> None:
        self.c, self.w, self.mistake = config, tensors, mistake

    def lin(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.mistake == "erf_gelu" else F.gelu(x, approximate="tanh")

    def vision(self, images: Tensor) -> Tensor:
        c = self.c.vision
        x = F.conv2d(images, self.w["vision.patch.weight"], self.w["vision.patch.bias"], stride=c.patch_size)
        x = x.flatten(2).transpose(1, 2) + self.w["vision.position.weight"]
        for i in range(c.layers):
            p = f"vision.layers.{i}"
            n = F.layer_norm(x, (c.width,), self.w[f"{p}.norm1.weight"], self.w[f"{p}.norm1.bias"], 1e-6)
            q, k, v = (self.lin(n, f"{p}.attn.{h}").unflatten(-1, (c.num_heads, -1)).transpose(1, 2) for h in "qkv")
            a = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
            x = x + self.lin(a.transpose(1, 2).flatten(2), f"{p}.attn.o")
            n = F.layer_norm(x, (c.width,), self.w[f"{p}.norm2.weight"], self.w[f"{p}.norm2.bias"], 1e-6)
            x = x + self.lin(self.gelu(self.lin(n, f"{p}.mlp.fc1")), f"{p}.mlp.fc2")
        x = F.layer_norm(x, (c.width,), self.w["vision.norm.weight"], self.w["vision.norm.bias"], 1e-6)
        return self.lin(x, "projector")

    def norm(self, x: Tensor, name: str, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        if cond is None:
            return y * (1 + self.w[f"{name}.weight"]), None
        modulation = self.lin(cond, f"{name}.modulation")
        modulation = modulation[:, None] if modulation.ndim == 2 else modulation
        scale, shift, gate = modulation.split(x.shape[-1], -1)
        if self.mistake == "scale_shift_swapped":
            scale, shift = shift, scale
        return y * (1 + scale) + shift, gate

    def rope(self, x: Tensor, pos: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        freq = 10000.0 ** (-2.0 * torch.arange(half, dtype=torch.float32) / x.shape[-1])
        angle = (pos[..., None].float() * freq)[:, :, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def stack(self, name, cfg, x, pos, see, cond, past):
        """All layers; `see` bool [B, T, S_past + T]; `past` keys and values per layer or None."""
        keys = []
        for i in range(cfg.layers):
            p = f"{name}.layers.{i}"
            n, g1 = self.norm(x, f"{p}.norm1", cond)
            q = self.rope(self.lin(n, f"{p}.attn.q").unflatten(-1, (cfg.num_heads, -1)), pos)
            k = self.rope(self.lin(n, f"{p}.attn.k").unflatten(-1, (cfg.num_kv_heads, -1)), pos)
            v = self.lin(n, f"{p}.attn.v").unflatten(-1, (cfg.num_kv_heads, -1))
            keys.append((k, v))
            if past is not None:
                k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
            k, v = (t.repeat_interleave(cfg.num_heads // cfg.num_kv_heads, 2) for t in (k, v))
            s = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(cfg.head_dim)
            s = s.masked_fill(~see[:, None], -2.3819763e38)
            a = torch.einsum("bhts,bshd->bthd", torch.softmax(s, -1), v).flatten(2)
            a = self.lin(a, f"{p}.attn.o")
            x = x + (a if g1 is None or self.mistake == "gate_ignored" else g1 * a)
            n, g2 = self.norm(x, f"{p}.norm2", cond)
            m = self.lin(self.gelu(self.lin(n, f"{p}.mlp.gate")) * self.lin(n, f"{p}.mlp.up"), f"{p}.mlp.down")
            x = x + (m if g2 is None else g2 * m)
        return x, keys

    def embed_time(self, t: Tensor) -> Tensor:
        D = self.c.expert.width
        frac = torch.linspace(0, 1, D // 2, dtype=torch.float64)
        period = self.c.min_period * (self.c.max_period / self.c.min_period) ** frac
        angle = t.double()[..., None] * 2 * math.pi / period
        return torch.cat([angle.sin(), angle.cos()], -1).float()

    def prefix(self, case: Case):
        B, V = case.images.shape[:2]
        views = self.vision(case.images.flatten(0, 1)).unflatten(0, (B, V)).flatten(1, 2)
        scale = 1.0 if self.mistake == "text_not_scaled" else math.sqrt(self.c.prefix.width)
        x = torch.cat([views, self.w["embedding.weight"][case.tokens] * scale], 1)
        view_mask = torch.ones_like(case.view_mask) if self.mistake == "masked_view_left_in" else case.view_mask
        mask = torch.cat([view_mask.repeat_interleave(self.c.vision.tokens, 1), case.token_mask], 1)
        if self.mistake == "padding_left_in":
            mask = torch.ones_like(mask)
        pos = mask.long().cumsum(1) - 1
        see = mask[:, None, :] & mask[:, :, None]
        if self.mistake == "causal_prefix":
            see = see & torch.ones(see.shape[-2:], dtype=torch.bool).tril()
        _, past = self.stack("prefix", self.c.prefix, x, pos, see, None, None)
        return views, x, mask, past

    def velocity(self, case: Case, x: Tensor, t: Tensor, mask: Tensor, past) -> Tensor:
        """t [B, H], one flow time per action token."""
        pi05 = self.c.kind == "pi05"
        B, H = x.shape[:2]
        act, e = self.lin(x, "action_in"), self.embed_time(t)
        if pi05:
            cond = F.silu(self.lin(F.silu(self.lin(e, "time_in")), "time_out"))
            tokens = act
        else:
            cond = None
            act = self.lin(F.silu(self.lin(torch.cat([act, e], -1), "action_time_in")), "action_time_out")
            tokens = torch.cat([self.lin(case.state, "state")[:, None], act], 1)
        T = tokens.shape[1]
        block = torch.zeros(T, dtype=torch.long) if pi05 else torch.tensor([0] + [1] * H)
        own = block[None, :] <= block[:, None]
        see = torch.cat([mask[:, None, :].expand(B, T, -1), own[None].expand(B, T, T)], -1)
        start = mask.long().sum(1) + (1 if self.mistake == "suffix_positions_plus_one" else 0)
        pos = start[:, None] + torch.arange(T)
        out, _ = self.stack("expert", self.c.expert, tokens, pos, see, cond, past)
        out, _ = self.norm(out, "expert.norm", cond)
        return self.lin(out[:, -H:], "action_out")

    def sample(self, case: Case, times: list[float], clamp: tuple[Tensor, int] | None = None):
        _, _, mask, past = self.prefix(case)
        x, velocities = case.noise.clone(), []
        B, H = x.shape[:2]
        for now in times:
            t = torch.full((B, H), now)
            if self.mistake == "time_one_step_early":
                t = t - 1.0 / len(times)
            if clamp is not None:
                x[:, : clamp[1]] = clamp[0][:, : clamp[1]]
                t[:, : clamp[1]] = 0.0
            v = self.velocity(case, x, t, mask, past)
            velocities.append(v)
            x = x - v / len(times)
            if self.mistake == "padded_dims_zeroed":
                x[..., 7:] = 0
        if clamp is not None:
            x[:, : clamp[1]] = clamp[0][:, : clamp[1]]
        return x, velocities, past, mask
