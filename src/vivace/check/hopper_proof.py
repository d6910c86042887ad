"""Proof beside the speed: accuracy against float32, freshness, and replays over poisoned memory.

Accuracy: final actions (normalised, [H, 32]) of held-out observations with several noise draws each, against plain
PyTorch in float32 on the same weights with the same noise. Plain PyTorch in bfloat16 is measured the same way: what
bfloat16 itself costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends import eager
from ..backends.cuda_graph import CudaGraphBackend
from ..config import EngineConfig
from ..errors import ConfigError, NumericsError
from ..model.pi import Pi
from ..types import ModelInputs, PrefixCache, PreviousChunk
from . import targets
from .hopper_engines import CONFIG, Engine
from .targets import Size

Chunking = Literal["trained", "guided"]
CHUNKING: tuple[Chunking, ...] = ("trained", "guided")

AT_ONCE = 8
"""Observations that the reference runs together: its loop is bound by launches."""


@dataclass(frozen=True)
class Samples:
    """Held-out requests of one setting.  inputs: [1, ...] each;  noise float32 [count, draws, H, 32], on the device."""

    inputs: Sequence[ModelInputs]
    noise: Tensor

    def first(self, count: int) -> Samples:
        """Only the first observations."""
        return Samples(self.inputs[:count], self.noise[:count])


def reference(model: Pi, samples: Samples, *, config: EngineConfig = CONFIG, at_once: int = AT_ONCE) -> Tensor:
    """Actions of plain PyTorch, [count, draws, H, 32] float32, several observations at a time."""
    backend, found = eager.create(model, config), []
    draws = samples.noise.shape[1]
    for start in range(0, len(samples.inputs), at_once):
        part = samples.inputs[start : start + at_once]
        inputs = ModelInputs(torch.cat([one.images for one in part]), torch.cat([one.tokens for one in part]))
        cache = _repeated(backend.prefill(inputs), draws)
        actions = backend.denoise(cache, samples.noise[start : start + at_once].flatten(0, 1))
        found.append(actions.unflatten(0, (-1, draws)).clone())
    return torch.cat(found)


def served(engine: Engine, inputs: ModelInputs, noise: Tensor, previous: PreviousChunk | None = None) -> Tensor:
    """As `policy.infer` asks a backend: the pictures first, then everything."""
    engine.backend.look(inputs.images)
    return engine.backend.infer(inputs, noise, previous=previous)


def actions_of(engine: Engine, samples: Samples) -> Tensor:
    """Actions of an engine as a robot gets them (`served`), one observation after the other; shape of `reference`."""
    found = []
    for inputs, noise in zip(samples.inputs, samples.noise, strict=True):
        found.append(torch.stack([served(engine, inputs, one[None])[0] for one in noise]))
    return torch.stack(found)


def two_calls(engine: Engine, samples: Samples) -> dict[str, int]:
    """In how many observations `infer`, with `look` before it and without, gives the bits of `denoise` of `prefill`.

    With the first noise of each: `infer` alone is what B0 times, with `look` what a robot gets, the two calls what
    conformance compares with other engines.
    """
    same = 0
    for inputs, noise in zip(samples.inputs, samples.noise, strict=True):
        apart = engine.backend.denoise(engine.backend.prefill(inputs), noise[:1]).clone()
        whole, cut = engine.backend.infer(inputs, noise[:1]), served(engine, inputs, noise[:1])
        same += int(torch.equal(whole, apart) and torch.equal(cut, apart))
    return {"same": same, "of": len(samples.inputs)}


def scores(actions: Tensor, truth: Tensor) -> dict[str, float]:
    """Cosine per sample (mean, worst) and relative L2 (over all samples, and the worst one); float64 inside.

    Raises NumericsError if an action is not finite.
    """
    if not bool(torch.isfinite(actions).all()):
        raise NumericsError("actions are not finite", got=f"{int((~torch.isfinite(actions)).sum())} values")
    got, wanted = actions.double().flatten(0, 1).flatten(1), truth.double().flatten(0, 1).flatten(1)
    lengths = got.norm(dim=1) * wanted.norm(dim=1)
    cosines = (got * wanted).sum(dim=1) / lengths.clamp_min(1e-300)
    apart = (got - wanted).norm(dim=1)
    return {
        "cosine_mean": float(cosines.mean()), "cosine_worst": float(cosines.min()),
        "rel_l2": float(apart.square().sum().sqrt() / wanted.norm()),
        "rel_l2_worst": float((apart / wanted.norm(dim=1).clamp_min(1e-300)).max()),
    }  # fmt: skip


def accuracy_row(size: Size, engine: Engine, actions: Tensor, truth: Tensor, plain: dict[str, float]) -> dict[str, Any]:
    """One row: scores of the engine beside those of plain bfloat16, and the marks."""
    found = scores(actions, truth)
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision,
        "observations": truth.shape[0], "noise_draws": truth.shape[1], **found, "plain_bfloat16": plain,
        "targets": targets.of_accuracy(engine.family, found, plain) if engine.ours else [],
    }  # fmt: skip


def fresh(engine: Engine, inputs: ModelInputs, noise: Tensor) -> dict[str, bool]:
    """Each change of the request must change the actions, and going back must bring back the same bits.

    Both of `infer` alone and of `look` and `infer`, which replay other graphs.
    """

    def both(request: ModelInputs, noise: Tensor) -> tuple[Tensor, Tensor]:
        return engine.backend.infer(request, noise).clone(), served(engine, request, noise).clone()

    def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> list[bool]:
        return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]

    first = both(inputs, noise)
    changed = {"image": replace(inputs, images=255 - inputs.images), "noise": inputs}
    one_view = inputs.images.clone()
    one_view[:, -1] = 255 - one_view[:, -1]
    changed["last view alone"] = replace(inputs, images=one_view)
    if inputs.tokens.shape[1]:
        other = inputs.tokens.clone()
        other[:, -1] = 3 if int(other[0, -1]) != 3 else 4
        changed["last prompt token"] = replace(inputs, tokens=other)
    found = {}
    for what, request in changed.items():
        found[what] = not any(same(both(request, -noise if what == "noise" else noise), first))
        found[f"{what}, and back"] = all(same(both(inputs, noise), first))
    return found


def fresh_policy(policy: Any, request: dict[str, Any], noise: Any) -> dict[str, bool]:
    """The same at the robot's side: pictures, state and task text as they come."""
    first = policy.infer(request, noise=noise).actions_normalized
    changed = {"task text": {**request, "prompt": _other_text(request["prompt"])}}
    if policy.io.embodiment.state_in_prompt:
        changed["state"] = {**request, "observation/state": -request["observation/state"]}
    changed["picture"] = {**request, "observation/image_0": 255 - request["observation/image_0"]}
    found = {}
    for what, one in changed.items():
        found[what] = not bool((policy.infer(one, noise=noise).actions_normalized == first).all())
        found[f"{what}, and back"] = bool((policy.infer(request, noise=noise).actions_normalized == first).all())
    return found


def poisoned(
    engine: Engine, inputs: ModelInputs, noise: Tensor, *, replays: int = 3, chunking: Sequence[Chunking] = ()
) -> dict[str, Any]:
    """Run over memory full of NaN: everything that a graph reads must be an input, a weight, or written before.

    Every byte of the memory pool of the engine's graphs is set to 0xFF (NaN in float32, bfloat16 and E4M3) before each
    run of each way to the actions: the whole graph that B0 times, `look` and `infer` as a robot gets them, `prefill` and
    `denoise`, and for `chunking` a robot's way with committed actions.
    Raises ConfigError for graphs whose pool is not known.
    """
    backend = engine.backend
    if engine.graphed and not isinstance(backend, CudaGraphBackend):
        raise ConfigError("the memory of these graphs cannot be poisoned", got=engine.name, wanted="cuda_graph")
    filled, ways = 0, {}
    for name, way in _ways(engine, inputs, noise, chunking).items():
        first, same = way().clone(), 0
        for _ in range(replays):
            if isinstance(backend, CudaGraphBackend):
                filled = poison_pool(backend.graph_pool, engine.model.device)
            same += int(torch.equal(way(), first))
        ways[name] = {"replays": replays, "same": same}
    of, same = (sum(way[what] for way in ways.values()) for what in ("replays", "same"))
    return {"bytes": filled, "replays": of, "same": same, "passed": same == of, "ways": ways}


def _ways(
    engine: Engine, inputs: ModelInputs, noise: Tensor, chunking: Sequence[Chunking]
) -> dict[str, Callable[[], Tensor]]:
    """Every way in which this engine comes to actions, each reading nothing that another one has left."""
    backend, ways = engine.backend, {"infer": engine.backend.graph_of(inputs, noise)}
    ways["look, infer"] = lambda: served(engine, inputs, noise)
    ways["prefill, denoise"] = lambda: backend.denoise(backend.prefill(inputs), noise)
    for mode in chunking:
        older = PreviousChunk(-noise, noise.shape[1] // 4, mode, torch.linspace(1, 0, noise.shape[1]).to(noise))
        ways[f"look, infer, {mode}"] = functools.partial(served, engine, inputs, noise, older)
    return ways


def poison_pool(pool: tuple[int, int], device: torch.device) -> int:
    """Fill all segments of one of the allocator's private pools with 0xFF; how many bytes that were.

    Other pools are left alone: weights that a plan quantised lie in one of their own (`precision.segments`).
    Raises NumericsError if the pool holds nothing: a proof over no memory would prove nothing.
    """
    torch.cuda.synchronize(device)
    filled = 0
    for segment in torch.cuda.memory_snapshot():
        if tuple(segment["segment_pool_id"]) != tuple(pool):
            continue
        nbytes = int(segment["total_size"])
        storage = torch._C._construct_storage_from_data_pointer(segment["address"], device, nbytes)
        whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))
        whole.fill_(0xFF)
        filled += nbytes
    torch.cuda.synchronize(device)
    if not filled:
        raise NumericsError("nothing was poisoned", got=f"no memory in pool {tuple(pool)}", wanted="the graphs' pool")
    return filled


def _other_text(text: str) -> str:
    """As long, and different: the first letter that is a vowel becomes another."""
    return text.translate(str.maketrans("aeio", "eioa"))


def _repeated(cache: PrefixCache, draws: int) -> PrefixCache:
    """Every observation `draws` times, one after the other."""
    return PrefixCache(
        k=tuple(one.repeat_interleave(draws, 0) for one in cache.k),
        v=tuple(one.repeat_interleave(draws, 0) for one in cache.v),
        length=cache.length.repeat_interleave(draws, 0),
        mask=None if cache.mask is None else cache.mask.repeat_interleave(draws, 0),
    )
