"""One Gemma block for both stacks: the prefix (plain norms) and the action expert (plain in pi0, modulated in pi0.5).

```
n = norm1(x);  q, k, v = rope(Wqkv n);  x = x + gate1 * Wo attention(q, [cache | k], [cache | v])
n = norm2(x);  x = x + gate2 * Wdown( gelu(Wgate n) * Wup n )
```
Plain norms have no gate. A modulation row is scale | shift | gate, one per norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import GemmaConfig
from ..errors import ConfigError
from ..ops.layers import AnyLinear, Linear, QuantisedLinear, RmsNorm, Rope
from ..ops.table import OpTable

ROPE_THETA = 10_000.0


class GemmaBlock(nn.Module):
    """Weights of one block. `only_kv`: a last prefix layer, of which nothing but keys and values is ever used."""

    def __init__(self, config: GemmaConfig, *, name: str, modulated: bool, only_kv: bool = False) -> None:
        super().__init__()
        D, F = config.width, config.mlp_width
        q_rows, kv_rows = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        self.only_kv = only_kv
        self.norm1 = RmsNorm(D, name=f"{name}.norm1", modulated=modulated)
        self.qkv = Linear(D, kv_rows if only_kv else q_rows + kv_rows, name=f"{name}.attn.qkv")
        if not only_kv:
            self.o = Linear(q_rows, D, name=f"{name}.attn.o")
            self.norm2 = RmsNorm(D, name=f"{name}.norm2", modulated=modulated)
            self.gate_up = Linear(D, 2 * F, name=f"{name}.mlp.gate_up")
            self.down = Linear(F, D, name=f"{name}.mlp.down")


@dataclass(frozen=True)
class StepBlock:
    """A block as one denoise step uses it: the same weights, that step's input scales."""

    norm1: RmsNorm
    qkv: AnyLinear
    o: AnyLinear
    norm2: RmsNorm
    gate_up: AnyLinear
    down: AnyLinear


class GemmaStack(nn.Module):
    """All blocks of one stack."""

    def __init__(self, config: GemmaConfig, *, name: str, modulated: bool, last_only_kv: bool) -> None:
        super().__init__()
        self.config = config
        last = config.layers - 1
        self.layers = nn.ModuleList(
            GemmaBlock(config, name=f"{name}.layers.{i}", modulated=modulated, only_kv=last_only_kv and i == last)
            for i in range(config.layers)
        )

    def block(self, index: int) -> GemmaBlock:
        """The block at `index`, with its type."""
        block = self.layers[index]
        assert isinstance(block, GemmaBlock)
        return block

    def block_at(self, index: int, step: int | None) -> GemmaBlock | StepBlock:
        """The block at `index` as denoise step `step` uses it; None: no layer here has scales per step."""
        block = self.block(index)
        if step is None:
            return block
        qkv, o, gate_up, down = (_at_step(one, step) for one in (block.qkv, block.o, block.gate_up, block.down))
        return StepBlock(block.norm1, qkv, o, block.norm2, gate_up, down)

    def scaled_steps(self) -> int:
        """Of how many denoise steps layers here have own input scales; 0: of none. Raises ConfigError if they disagree."""
        counts = {layer.steps for layer in self.modules() if isinstance(layer, QuantisedLinear)} - {0}
        if len(counts) > 1:
            raise ConfigError(
                "layers have input scales of different numbers of steps", got=sorted(counts), wanted="one number",
                do="calibrate again",
            )  # fmt: skip
        return counts.pop() if counts else 0

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, head dim)."""
        return self.config.num_heads, self.config.num_kv_heads, self.config.head_dim


def _at_step(layer: nn.Module, step: int) -> AnyLinear:
    return layer.at_step(step) if isinstance(layer, QuantisedLinear) else layer  # type: ignore[return-value]


def rope_table(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Rope:
    """cos and sin of every position.  positions int [B, T] -> two [B, T, head_dim/2].

    Numerics: angles and functions float32, then one rounding to `dtype`, as the originals do.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) * ROPE_THETA**-exponents
    return Rope((torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)))


def rope_rows(table: Rope, positions: Tensor | slice) -> Rope:
    """Rows of a table over all positions.  table two [P, head_dim/2]; positions [B, T] or a slice (then no work at all)."""
    cos, sin = table
    if isinstance(positions, slice):
        return Rope((cos[None, positions], sin[None, positions]))
    return Rope((cos[positions], sin[positions]))


def gate_of(modulation: Tensor | None) -> Tensor | None:
    """The third part of scale | shift | gate, or None for a plain norm."""
    return None if modulation is None else modulation.chunk(3, dim=-1)[2]


def finish(
    block: GemmaBlock | StepBlock,
    x: Tensor,
    mixed: Tensor,
    ops: OpTable,
    *,
    modulations: tuple[Tensor | None, Tensor | None],
    following: tuple[RmsNorm, Tensor | None, AnyLinear],
) -> tuple[Tensor, Tensor]:
    """Everything after attention, and the norm that comes next.

    x [B, T, D], mixed [B, T, N*head_dim], following = (next norm, its modulation, the linear that reads it)
    returns (x [B, T, D], its norm [B, T, D])
    """
    first, second = modulations
    x, n = ops.linear_residual_norm(mixed, block.o, x, gate_of(first), block.norm2, second, block.gate_up)
    hidden = ops.geglu(n, block.gate_up, block.down)
    return ops.linear_residual_norm(hidden, block.down, x, gate_of(second), *following)
