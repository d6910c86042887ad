"""Flow matching: noise becomes actions by a few Euler steps. The only file that knows the time convention.

t = 1 is noise and t = 0 is the action (openpi's convention, the opposite of the paper): x <- x + dt * v(x, t), dt = -1/N.
Real-time chunking enters here too. The robot is executing an older chunk while this one is computed:

* trained: the first d actions are clamped to that chunk and carry flow time 0 per token (arXiv 2512.05964);
* guided:  the velocity is pulled so that the predicted clean chunk stays near the older one, with weights that fade. As in
  LeRobot the pull is the weighted error itself, without a backward pass through the network (pi05.md section 4.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..config import TimeGrid
from ..errors import ConfigError, ShapeError
from ..types import PreviousChunk, Trace

Schedule = Literal["zeros", "ones", "linear", "exp"]


def time_grid(num_steps: int, kind: TimeGrid) -> list[float]:
    """Flow time of every step as float32 values: "accumulated" t += dt as openpi does, "direct" 1 + s*dt as LeRobot."""
    if num_steps < 1:
        raise ConfigError("the flow needs at least one step", got=num_steps, do="set num_denoise_steps >= 1")
    if kind == "direct":
        return [float(np.float32(1.0 - s / num_steps)) for s in range(num_steps)]
    dt, t, grid = np.float32(-1.0 / num_steps), np.float32(1.0), []
    for _ in range(num_steps):
        grid.append(float(t))
        t = np.float32(t + dt)
    return grid


def time_embedding(
    times: Float[Tensor, " T"], width: int, *, min_period: float, max_period: float, dtype: torch.dtype
) -> Float[Tensor, "T {width}"]:
    """sin and cos of flow times at `width`/2 periods from 4 ms to 4 s.  times [T] -> float32 [T, width].

    Numerics: computed in `dtype` (float64 in openpi's and LeRobot's PyTorch, float32 in JAX), then rounded to float32;
    the largest angle is 2 pi 250, so the choice moves the result by 1e-5.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=dtype, device=times.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = times.to(dtype)[:, None] * (2.0 * math.pi / period)[None, :]
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1).float()


def prefix_weights(schedule: Schedule, *, delay: int, end: int, horizon: int) -> Float[Tensor, " {horizon}"]:
    """How strongly each action is pulled to the older chunk, float32 [horizon].

    delay  actions before it are already committed: weight 1        end  actions from it on are free: weight 0
    In between "linear" falls as (end - k) / (end - delay + 1), "exp" as u * (e^u - 1) / (e - 1) of that, "ones" stays 1,
    "zeros" is 0 at once.       Source: LeRobot policies/rtc and the authors' kinetix code, which agree.
    """
    start = min(delay, end)
    k = torch.arange(horizon, dtype=torch.float32)
    linear = ((end - k) / (end - start + 1)).clamp(0.0, 1.0)
    falling = {
        "linear": linear,
        "exp": linear * torch.expm1(linear) / math.expm1(1.0),
        "ones": torch.ones_like(k),
        "zeros": torch.zeros_like(k),
    }
    if schedule not in falling:
        raise ConfigError("unknown guidance schedule", got=repr(schedule), wanted=f"one of {sorted(falling)}")
    weights = torch.where(k < start, torch.ones_like(k), falling[schedule])
    return torch.where(k < end, weights, torch.zeros_like(k))


def guided_velocity(
    x: Float[Tensor, "B H A"], velocity: Float[Tensor, "B H A"], t: float, previous: PreviousChunk
) -> Float[Tensor, "B H A"]:
    """Pull the velocity so that x - t*v, the predicted clean chunk, moves towards the older chunk.  All [B, H, 32]."""
    assert previous.weights is not None, "guided chunking needs weights"
    tau = 1.0 - t
    clean = x - t * velocity
    error = (previous.actions - clean) * previous.weights.to(x.device)[None, :, None]
    variance_ratio = ((1.0 - tau) ** 2 + tau**2) / (1.0 - tau) ** 2
    wanted, bound = (1.0 - tau) / tau * variance_ratio if tau > 0.0 else math.inf, previous.max_guidance
    strength = bound.clamp(max=wanted) if isinstance(bound, Tensor) else min(wanted, bound)
    return velocity - strength * error


def committed_mask(
    previous: PreviousChunk | None, horizon: int, device: torch.device
) -> Bool[Tensor, " {horizon}"] | None:
    """bool [H], True for the leading actions that are clamped; None outside trained real-time chunking."""
    if previous is None or previous.mode != "trained":
        return None
    if not 0 <= previous.inference_delay <= horizon:
        raise ShapeError("inference delay outside the chunk", got=previous.inference_delay, wanted=f"0..{horizon}")
    return torch.arange(horizon, device=device) < previous.inference_delay


def sample(
    velocity_at: Callable[[Tensor, int], Tensor],
    noise: Float[Tensor, "B H A"],
    times: list[float],
    *,
    previous: PreviousChunk | None = None,
    committed: Bool[Tensor, " H"] | None = None,
    trace: Trace | None = None,
) -> Float[Tensor, "B H A"]:
    """Integrate the flow.  velocity_at(x [B, H, 32], step) -> [B, H, 32]; noise float32 [B, H, 32] -> actions, float32.

    committed  bool [H], what `committed_mask` says if the caller has it on the device already
    """
    dt = -1.0 / len(times)
    clamped = committed_mask(previous, noise.shape[1], noise.device) if committed is None else committed
    x = _clamp(noise, previous, clamped)
    if trace is not None:
        trace.x.append(x.clone())
    for step, t in enumerate(times):
        velocity = velocity_at(x, step)
        used = velocity
        if previous is not None and previous.mode == "guided":
            used = guided_velocity(x, velocity, t, previous)
        x = _clamp(torch.add(x, used, alpha=dt), previous, clamped)
        if trace is not None:
            trace.velocity.append(velocity.clone())
            trace.velocity_used.append(used.clone())
            trace.x.append(x.clone())
    return x


def _clamp(x: Tensor, previous: PreviousChunk | None, clamped: Tensor | None) -> Tensor:
    if previous is None or clamped is None:
        return x
    return torch.where(clamped[None, :, None], previous.actions, x)
