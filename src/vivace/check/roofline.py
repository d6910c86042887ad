"""What one inference must compute and move, from first principles, and the time below which no GPU can go.

A stage that needs F operations and B bytes takes at least max(F / peak, B / bandwidth). Counted: every matrix product
(a multiply-add is 2 operations), every weight read once per use, keys and values written once and read once per denoise
step. Not counted: norms, activations, intermediate tensors that can stay on the chip, launches. So these are floors and
never predictions. The counts assume what vivace does by default: no padding, last prefix layer computes only K and V, time
modulation read from a table, pi0's state token cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import GemmaConfig, ModelConfig
from ..errors import ConfigError
from .gpus import Gpu

Precision = Literal["float32", "bfloat16", "fp8", "int8", "fp4"]
STAGES = ("vision", "prefix", "denoise")
_WEIGHT_BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1, "fp4": 0.5}


@dataclass(frozen=True)
class Workload:
    """The setting of a latency: without all of these a number is not a result. `batch` observations at once."""

    views: int
    prompt_tokens: int
    horizon: int
    steps: int = 10
    batch: int = 1


@dataclass(frozen=True)
class StageCost:
    """Work of one stage: floating-point operations, and bytes that must cross the memory bus.

    attention_flops  of `flops`, those of queries with keys and of weights with values, which no plan quantises
    """

    stage: str
    flops: float
    weight_bytes: float
    cache_bytes: float
    attention_flops: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Weights and keys/values together."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class StageFloor:
    """The least time of one stage on one GPU, and what decides it."""

    stage: str
    compute_ms: float
    memory_ms: float
    floor_ms: float
    bound: Literal["compute", "memory"]


def prefix_tokens(config: ModelConfig, work: Workload) -> int:
    """S: image tokens of the real views and prompt tokens, no padding."""
    return config.vision.tokens * work.views + work.prompt_tokens


def stage_costs(config: ModelConfig, work: Workload, *, precision: Precision = "bfloat16") -> tuple[StageCost, ...]:
    """Work of vision, prefix and denoise for one inference. Raises ConfigError for an unknown precision or a size below 1.

    Weights are counted in `precision`; keys and values in 4 bytes for float32 and 2 otherwise.
    """
    if precision not in _WEIGHT_BYTES:
        raise ConfigError("unknown precision", got=repr(precision), wanted=f"one of {list(_WEIGHT_BYTES)}")
    if min(work.views, work.horizon, work.steps, work.batch) < 1 or work.prompt_tokens < 0:
        raise ConfigError("a workload needs at least one view, action, step and observation", got=work)
    per_weight = _WEIGHT_BYTES[precision]
    return (
        _vision(config, work, per_weight),
        _prefix(config, work, per_weight, _cache_bytes_per_token(config, precision)),
        _denoise(config, work, per_weight, _cache_bytes_per_token(config, precision)),
    )


def stage_floors(
    costs: tuple[StageCost, ...], gpu: Gpu, *, precision: Precision = "bfloat16"
) -> tuple[StageFloor, ...]:
    """The floor of each stage on one GPU. Raises ConfigError when the GPU has no unit for that precision."""
    peak = {"float32": gpu.float32, "bfloat16": gpu.bfloat16, "fp8": gpu.fp8, "int8": gpu.int8, "fp4": gpu.fp4}[
        precision
    ]
    if peak is None:
        raise ConfigError(f"{gpu.label} has no {precision} matrix unit", do="choose another --precision")
    floors = []
    for cost in costs:
        compute_ms = cost.flops / (peak * 1e12) * 1e3
        memory_ms = cost.total_bytes / (gpu.bandwidth_gb_s * 1e9) * 1e3
        bound: Literal["compute", "memory"] = "compute" if compute_ms >= memory_ms else "memory"
        floors.append(StageFloor(cost.stage, compute_ms, memory_ms, max(compute_ms, memory_ms), bound))
    return tuple(floors)


def layer_weights(gemma: GemmaConfig) -> int:
    """Weights of the seven linears of one Gemma layer: q, k, v, o, gate, up, down."""
    inner, kv = gemma.num_heads * gemma.head_dim, gemma.num_kv_heads * gemma.head_dim
    return gemma.width * (2 * inner + 2 * kv) + 3 * gemma.width * gemma.mlp_width


def _kv_weights(gemma: GemmaConfig) -> int:
    return 2 * gemma.width * gemma.num_kv_heads * gemma.head_dim


def _attention_flops(gemma: GemmaConfig, *, queries: int, keys: int) -> float:
    return 2 * 2 * queries * keys * gemma.num_heads * gemma.head_dim  # scores and weighted sum


def _cache_bytes_per_token(config: ModelConfig, precision: str) -> float:
    width = config.prefix.num_kv_heads * config.prefix.head_dim
    return config.prefix.layers * 2 * width * (4 if precision == "float32" else 2)


def _vision(config: ModelConfig, work: Workload, per_weight: float) -> StageCost:
    v, tokens = config.vision, config.vision.tokens
    layer = 4 * v.width**2 + 2 * v.width * v.mlp_width
    patch = 3 * v.patch_size**2 * v.width
    weights = v.layers * layer + patch + v.width * config.prefix.width
    small = (
        v.layers * (4 * v.width + v.mlp_width + v.width + 4 * v.width) + (tokens + 3) * v.width + config.prefix.width
    )
    attention = 2 * 2 * tokens * tokens * v.width * v.layers
    images = work.batch * work.views
    flops = images * (2 * tokens * weights + attention)
    return StageCost("vision", flops, (weights + small) * per_weight, 0.0, images * attention)


def _prefix(config: ModelConfig, work: Workload, per_weight: float, cache_bytes: float) -> StageCost:
    p, tokens = config.prefix, prefix_tokens(config, work)
    weights = (p.layers - 1) * layer_weights(p) + _kv_weights(p)
    attention = (p.layers - 1) * _attention_flops(p, queries=tokens, keys=tokens)
    flops = work.batch * (2 * tokens * weights + attention)
    gathered = work.batch * work.prompt_tokens * p.width * per_weight
    moved = weights * per_weight + gathered
    return StageCost("prefix", flops, moved, work.batch * tokens * cache_bytes, work.batch * attention)


def _denoise(config: ModelConfig, work: Workload, per_weight: float, cache_bytes: float) -> StageCost:
    e, tokens, rows = config.expert, prefix_tokens(config, work), work.horizon
    cached = tokens + (1 if config.kind == "pi0" else 0)  # the state token's K and V never change
    heads = 2 * config.action_width * e.width + (3 * e.width * e.width if config.kind == "pi0" else 0)
    weights = e.layers * layer_weights(e) + heads
    attention = e.layers * _attention_flops(e, queries=rows, keys=cached + rows)
    table = (2 * e.layers + 1) * 3 * e.width if config.kind == "pi05" else 0
    times = work.batch * work.steps
    flops = times * (2 * rows * weights + attention)
    moved = work.steps * (weights + table) * per_weight
    return StageCost("denoise", flops, moved, times * cached * cache_bytes, times * attention)
