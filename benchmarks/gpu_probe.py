"""Checks, tunes and times kernels and whole policies on one NVIDIA GPU, many variants in one process.

    PYTHONPATH=src python benchmarks/gpu_probe.py --out results.json --loops 50:968:bf16:tune,10:560:fp8

Right before fast: nothing is timed whose output was not compared with float32 on the same weights first. Every output
buffer is poisoned with NaN in the checked run, and replays are compared bit by bit. Times are medians over replays of a
CUDA graph on buffers whose content is random (boundary B0). Weights are random with outlier channels; speed does not
depend on their values, and errors are only comparable within one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vivace.backends import cuda_graph, eager
from vivace.backends.loop import run_flow
from vivace.config import EngineConfig, GemmaConfig, ModelConfig, VisionConfig
from vivace.model.pi import Pi
from vivace.ops import denoise, denoise_attention, denoise_gemm, denoise_norm, launch, reference
from vivace.ops.denoise import Tiles
from vivace.ops.denoise_attention import AttentionTile
from vivace.ops.denoise_gemm import Tile
from vivace.ops.table import OpTable, reference_ops
from vivace.precision import calibrate, quantize
from vivace.precision import plan as plans
from vivace.precision.flavours import parameter_dtype
from vivace.types import ModelInputs, PrefixCache

DEVICE = torch.device("cuda")
EXPERT_ONLY = ModelConfig(vision=VisionConfig(layers=1), prefix=GemmaConfig(layers=1, mlp_width=64), vocab_size=64)
SETTINGS = {"3,200,50": (3, 200, 50), "3,16,50": (3, 16, 50), "2,0,63": (2, 0, 63), "2,48,10": (2, 48, 10),
            "1,48,50": (1, 48, 50), "2,45,10": (2, 45, 10)}  # fmt: skip


# --- random networks and requests ---------------------------------------------------------------------------------


def random_model(config: ModelConfig, seed: int = 0) -> Pi:
    """Full-size random weights in the bfloat16 flavour; one input channel in 64 is eight times as large."""
    with torch.device("meta"):
        model = Pi(config)
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    for path, meta in list(model.named_parameters()):
        name = path.replace(".qkv", ".attn.qkv").replace("vision.position", "vision.position.weight")
        dtype = parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")
        value = torch.randn(meta.shape, generator=g, device=DEVICE, dtype=torch.float32)
        value *= 0.1 if value.dim() == 1 or path == "embedding" else value.shape[-1] ** -0.5
        if value.dim() == 2 and path != "embedding" and "modulation" not in path:
            value[:, torch.arange(0, value.shape[1], 64)] *= 8.0
        if ".norm" in path and "vision" in path and path.endswith("weight"):
            value += 1.0
        owner = model.get_submodule(path.rpartition(".")[0])
        setattr(owner, path.rpartition(".")[2], nn.Parameter(value.to(dtype), requires_grad=False))
    return model.eval()


def float32_copy(model: Pi) -> Pi:
    """The same (rounded) weights in float32 with reference operations: the truth of this run."""
    wide = copy.deepcopy(model).float()
    wide.ops = reference_ops()
    return wide


def random_cache(config: ModelConfig, S: int, seed: int) -> PrefixCache:
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    shape = (1, S, 1, config.expert.head_dim)
    make = lambda: torch.randn(shape, generator=g, device=DEVICE).bfloat16()  # noqa: E731
    layers = range(config.expert.layers)
    return PrefixCache(tuple(make() for _ in layers), tuple(make() for _ in layers), torch.tensor([S], device=DEVICE))


def wide_cache(cache: PrefixCache) -> PrefixCache:
    return replace(cache, k=tuple(k.float() for k in cache.k), v=tuple(v.float() for v in cache.v))


def request(setting: tuple[int, int, int], config: ModelConfig, seed: int) -> tuple[ModelInputs, Tensor]:
    V, L, H = setting
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    images = torch.randint(0, 256, (1, V, 3, 224, 224), dtype=torch.uint8, generator=g, device=DEVICE)
    tokens = torch.randint(0, config.vocab_size, (1, L), generator=g, device=DEVICE)
    return ModelInputs(images, tokens), torch.randn(1, H, 32, generator=g, device=DEVICE)


# --- checks and clocks --------------------------------------------------------------------------------------------


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """Every new buffer starts as NaN (E4M3: 0x7F, which is NaN too)."""
    real = torch.empty

    def empty(*shape: Any, **kwargs: Any) -> Tensor:
        made = real(*shape, **kwargs)
        if made.is_cuda and made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(0x7F)
        elif made.is_cuda and made.is_floating_point():
            made.fill_(float("nan"))
        return made

    torch.empty = empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = real


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    torch.cuda.synchronize()
    return graph, result


def replay_ms(replay: Callable[[], Any], n: int = 40) -> dict[str, float]:
    for _ in range(5):
        replay()
    times = []
    for _ in range(n):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    times.sort()
    return {
        "p50": statistics.median(times),
        "p95": times[int(0.95 * n)],
        "p99": times[int(0.99 * n)],
        "min": times[0],
        "n": n,
    }


def kernel_times(replay: Callable[[], Any]) -> dict[str, list[float]]:
    """{kernel: [count, mean us]} of one replay; with programmatic launch a duration includes the wait."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    rows = {
        e.key[:60]: [e.count, round(e.self_device_time_total / e.count, 2)] for e in profile.key_averages() if e.count
    }
    return dict(sorted(rows.items(), key=lambda row: -row[1][0] * row[1][1])[:25])


# --- the denoise loop alone -----------------------------------------------------------------------------------------


@dataclass
class Loop:
    """One denoise loop on a random cache, with its float32 truth."""

    model: Pi
    T: int
    S: int
    cache: PrefixCache
    noise: Tensor
    truth: Tensor
    table: Any
    rows: dict[str, Any]
    boundary: bool = True  # the end of a step and the beginning of the next as one operation

    def run(self, ops: OpTable) -> Tensor:
        self.model.ops = ops
        step = None if self.boundary else self.model.denoise_step
        with torch.no_grad():
            return run_flow(self.model, step, self.table, self.cache, self.noise, previous=None, trace=None)

    def ms(self, tiles: Tiles, *, n: int = 25) -> float:
        """Checked, then timed. Infinite where the variant is wrong, does not fit, or does not compile."""
        try:
            graph, out = captured(lambda: self.run(denoise.denoise_ops(reference_ops(), tiles)))
        except Exception as failure:
            self.rows[str(tiles)[-60:]] = repr(failure)[:200]
            return float("inf")
        graph.replay()
        torch.cuda.synchronize()
        if (
            not error(out, self.truth)
            < 1.5 * self.rows["error_fp8_reference" if self.rows["fp8"] else "error_plain_bf16"]
        ):
            return float("inf")
        return replay_ms(graph.replay, n)["p50"]


def make_loop(T: int, S: int, fp8: bool, seed: int) -> Loop:
    model = random_model(EXPERT_ONLY, seed)
    cache = random_cache(EXPERT_ONLY, S, seed + 1)
    noise = torch.randn(1, T, 32, device=DEVICE, generator=torch.Generator(device=DEVICE).manual_seed(seed + 2))
    with torch.no_grad():
        wide = float32_copy(model)
        table = wide.time_table(10)
        truth = run_flow(wide, wide.denoise_step, table, wide_cache(cache), noise, previous=None, trace=None)
        table = model.time_table(10)
        model.ops = reference_ops()
        plain = run_flow(model, model.denoise_step, table, cache, noise, previous=None, trace=None)
        rows: dict[str, Any] = {"T": T, "S": S, "fp8": fp8, "error_plain_bf16": error(plain, truth)}
        rows["error_of_returning_noise"] = error(noise, truth)
        if fp8:
            with calibrate.watch(model) as ranges:
                run_flow(model, model.denoise_step, table, cache, noise * 0.9, previous=None, trace=None)
            quantize.apply(model, calibrate.with_ranges(plans.preset("fp8-expert"), ranges, data="synthetic: probe"))
            fake = run_flow(model, model.denoise_step, table, cache, noise, previous=None, trace=None)
            rows["error_fp8_reference"] = error(fake, truth)
        del wide
    return Loop(model, T, S, cache, noise, truth, table, rows)


def check_loop(loop: Loop, tiles: Tiles, *, profile: bool = False, replays: int = 1000) -> dict[str, Any]:
    ops = denoise.denoise_ops(reference_ops(), tiles)
    with poisoned():
        eager_out = loop.run(ops)
    graph, out = captured(lambda: loop.run(ops))
    graph.replay()
    torch.cuda.synchronize()
    first = out.clone()
    same = 0
    for _ in range(replays):
        out.fill_(float("nan"))
        graph.replay()
        same += int(torch.equal(out, first))
    row = {
        "error": error(first, loop.truth), "eager_equals_graph": bool(torch.equal(eager_out, first)),
        "bit_identical_replays": f"{same}/{replays}", **replay_ms(graph.replay, 60),
    }  # fmt: skip
    if profile:  # slows every later launch of this process down by a tenth
        row["kernels"] = kernel_times(graph.replay)
    return row


def candidates(rows: int, fp8: bool) -> dict[str, list[Any]]:
    wide = 256 if fp8 else 128
    out: dict[str, list[Any]] = {"qkv": [], "o": [], "gate_up": [], "down": [], "attention": [], "norm_warps": [2, 8]}
    depths = ((wide // 2, 4), (wide // 2, 6), (wide, 2), (wide, 3), (wide, 4), (wide, 5), (2 * wide, 2), (2 * wide, 3))
    for bulk in (False, True):
        for bk, stages in (*depths, (2 * wide, 4)):
            for warps in (4, 8):
                out["qkv"] += [Tile(bn, bk, 1, warps, stages, bulk) for bn in (16, 32)]
                out["gate_up"] += [Tile(bn, bk, 1, warps, stages, bulk) for bn in (16, 32, 64)]
            for bn, split in ((32, 2), (32, 4), (64, 8), (64, 4), (32, 8), (128, 8)):
                out["o"] += [Tile(bn, bk, split, 4, stages, bulk)]
                out["down"] += [Tile(bn, bk, split, 4, stages, bulk)]
    for r in (16, 32) if rows <= 16 else (64, 128):
        for keys, warps in ((32, 4), (64, 4), (64, 8), (128, 8), (128, 4)):
            for parts in (torch.float32, torch.bfloat16):
                for combine in ((1, 2), (1, 4), (2, 4), (4, 4), (4, 8)):
                    out["attention"].append(AttentionTile(r, keys, warps, *combine, parts))
    return out


def fits(field: str, tile: Any, rows: int, fp8: bool) -> bool:
    """Shared memory of the pipeline under 200 KB, no stage beyond the work."""
    if not isinstance(tile, Tile):
        return True
    accumulators = 2 if field in ("qkv", "gate_up") else 1
    stage = (max(16, min(64, rows)) + accumulators * tile.block_n) * tile.block_k * (1 if fp8 else 2)
    K = {"qkv": 1024, "gate_up": 1024, "o": 2048, "down": 4096}[field]
    steps = K // (tile.block_k * tile.split_k)
    return (
        stage * tile.stages <= 200_000 and K % (tile.block_k * tile.split_k) == 0 and tile.stages <= max(2, steps + 1)
    )


def early_variants(start: Tiles) -> dict[str, Tiles]:
    """Which kernels let their successor launch before their own work is done."""
    light = replace(
        start, norm_early=True, attention=replace(start.attention, early=True, combine_early=True),
        o=replace(start.o, early=True), down=replace(start.down, early=True),
    )  # fmt: skip
    return {
        "norm": replace(start, norm_early=True),
        "combine": replace(start, attention=replace(start.attention, combine_early=True)),
        "split": replace(start, attention=replace(start.attention, early=True)),
        "o": replace(start, o=replace(start.o, early=True)),
        "down": replace(start, down=replace(start.down, early=True)),
        "qkv": replace(start, qkv=replace(start.qkv, early=True)),
        "gate_up": replace(start, gate_up=replace(start.gate_up, early=True)),
        "light successors": light,
        "light + qkv": replace(light, qkv=replace(start.qkv, early=True)),
        "all": replace(light, qkv=replace(start.qkv, early=True), gate_up=replace(start.gate_up, early=True)),
    }


def attention_variants(start: Tiles) -> dict[str, Tiles]:
    """Other cuts of the attention, for caches of other lengths than the tuned one."""
    tiles = [
        replace(start.attention, rows=rows, keys=keys, warps=warps, combine_rows=c)
        for rows, keys, warps in ((64, 32, 4), (64, 64, 8), (32, 32, 4), (32, 64, 4), (64, 64, 4), (16, 64, 4))
        for c in (2, 4)
    ]
    return {short(tile): replace(start, attention=tile, attention_mid=None) for tile in tiles}


def variants_of(T: int, S: int, fp8: bool, start: Tiles) -> list[tuple[str, Any]]:
    """(field, value) in the order in which they are tried inside the loop."""
    w = 2 if fp8 else 1
    a, out = start.attention, []
    cuts = (
        ((32, 128, 8, 4), (32, 64, 8, 4), (64, 64, 8, 4))
        if S > 400
        else ((32, 64, 8, 4), (32, 64, 8, 2), (32, 32, 4, 4))
    )
    if T > 16:
        out += [("attention", replace(a, rows=r, keys=k, warps=n, combine_rows=c)) for r, k, n, c in cuts]
    out += [("early", (launch.EARLY, launch.FIRST)), ("early", (launch.FIRST, launch.FIRST))]
    if fp8:
        out += [
            ("gate_up", Tile(32, 128 * w, 1, 4, 4, ahead=True)),
            ("o", Tile(32, 256, 8, 4, 1, early=True, ahead=True)),
        ]
        out += [("gate_up", Tile(32, 256, 1, 4, 5))]
    return out


def changed(tiles: Tiles, field: str, value: Any) -> Tiles:
    if field == "carveout":
        products, attention, norms = value
        return denoise.shared(tiles, products=products, attention=attention, norms=norms)
    if field == "early":
        return replace(tiles, norm_early=value[0], attention=replace(tiles.attention, combine_early=value[1]))
    if field == "attention":
        value = replace(value, combine_early=tiles.attention.combine_early, carveout=tiles.attention.carveout)
    if isinstance(value, Tile):
        value = replace(value, carveout=getattr(tiles, field).carveout)
    return replace(tiles, **{field: value})


def explore(loop: Loop, start: Tiles, found: dict[str, Any], *, fp8: bool) -> Tiles:
    """Variant after variant inside the whole loop; what gains 8 us stays. Products are compiled in threads first."""
    start = replace(start, attention=denoise._attention_tile(start, loop.S), attention_mid=None, attention_short=None)
    variants, begin = variants_of(loop.T, loop.S, fp8, start), time.perf_counter()
    jobs = []
    for field in ("qkv", "o", "gate_up", "down", "attention"):
        make = chain_of(loop, field, layers=1)
        truth = make(getattr(start, field))()[0]
        jobs += [(make, tile, truth) for name, tile in variants if name == field]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda job: compiled(*job), jobs))
    torch.cuda.synchronize()
    found["compile_s"] = round(time.perf_counter() - begin, 1)
    loop.boundary = False
    found["start, boundary in parts"] = loop.ms(start, n=15)
    loop.boundary = True
    best, best_ms = start, loop.ms(start, n=15)
    found["start"] = best_ms
    shares = [("carveout", (100, 100, 100)), ("carveout", (-1, -1, 100)), ("carveout", (-1, 100, 100))]
    for field, tile in [*shares, *variants]:
        name = f"{field} {short(tile)}"
        tiles = changed(start if field == "carveout" else best, field, tile)
        found[name] = ms = round(loop.ms(tiles, n=15), 4)
        print(f"{name} {ms:.3f}", flush=True)
        if ms < best_ms - 0.008:
            best, best_ms = tiles, ms
    found["start again"], found["best"] = loop.ms(start, n=15), best_ms
    return best


def chain_of(loop: Loop, field: str, *, layers: int = 18) -> Callable[[Any], Callable[[], Any]]:
    """tile -> a function that runs one operation for every layer, each with its own weights."""
    model, T, blocks = loop.model, loop.T, [loop.model.expert.block(i) for i in range(layers)]
    context = model.suffix_context(loop.cache, T)
    rope = tuple(table.reshape(T, -1) for table in context.rope)
    first = blocks[0]
    x = reference.hand_over(torch.randn(T, 1024, device=DEVICE).bfloat16(), first.qkv)
    n = reference.hand_over(torch.randn(T, 1024, device=DEVICE).bfloat16(), first.gate_up)
    mixed = reference.hand_over(torch.randn(T, 2048, device=DEVICE).bfloat16(), first.o)
    hidden = reference.hand_over(torch.randn(T, 4096, device=DEVICE).bfloat16(), first.down)
    packed = torch.randn(1, T, 10, 256, device=DEVICE).bfloat16()
    q, k, v = packed.split([8, 1, 1], dim=2)
    parts, residual = torch.randn(4, T, 1024, device=DEVICE), torch.randn(T, 1024, device=DEVICE)
    row = loop.table.at(3).of(4)
    run: dict[str, Callable[[Any, Any, int], Any]] = {
        "qkv": lambda b, t, i: denoise_gemm.qkv(x, b.qkv, rope, (8, 1, 256), t),
        "o": lambda b, t, i: denoise_gemm.parts(mixed, b.o, t),
        "gate_up": lambda b, t, i: denoise_gemm.geglu(n, b.gate_up, b.down, t),
        "down": lambda b, t, i: denoise_gemm.parts(hidden, b.down, t),
        "attention": lambda b, t, i: denoise_attention.attention(
            q, k, v, None, (loop.cache.k[i], loop.cache.v[i]), b.o, t
        ),
        "norm_warps": lambda b, t, i: denoise_norm.sum_norm(
            parts, residual, row[:, 2048:], b.norm2, row, b.gate_up, warps=t
        ),
    }
    one = run[field]
    return lambda tile: lambda: [one(b, tile, i) for i, b in enumerate(blocks)]


def chain_us(work: Callable[[], Any], repeats: int = 4) -> float:
    """Microseconds of one operation inside a chain of 18 * repeats."""
    graph, _ = captured(lambda: [work() for _ in range(repeats)])
    return replay_ms(graph.replay, 12)["p50"] * 1e3 / (18 * repeats)


def tune(loop: Loop, start: Tiles, *, fp8: bool) -> tuple[Tiles, dict[str, Any]]:
    """Each operation in a chain of its own, then the three best of each inside the whole loop."""
    found: dict[str, Any] = {}
    best, lists = start, candidates(loop.T, fp8)
    for field, tiles in lists.items():
        trials = [t for t in dict.fromkeys([getattr(start, field), *tiles]) if fits(field, t, loop.T, fp8)]
        make = chain_of(loop, field)
        truth = make(trials[0])()[0]
        with ThreadPoolExecutor(14) as pool:
            alive = [t for t in pool.map(lambda t: compiled(make, t, truth), trials) if t is not None]
        torch.cuda.synchronize()
        times = sorted(((chain_us(make(tile)), str(short(tile)), tile) for tile in alive), key=lambda row: row[:2])
        found[field] = {name: round(us, 3) for us, name, _ in times}
        best = replace(best, **{field: times[0][2]})
        lists[field] = [tile for _, _, tile in times[:4]]
    best_ms = loop.ms(best)
    found["chains say"] = best_ms
    for field, tiles in lists.items():
        for tile in tiles[1:]:
            ms = loop.ms(replace(best, **{field: tile}))
            found[f"loop: {field} {short(tile)}"] = round(ms, 4)
            if ms < best_ms - 0.01:
                best, best_ms = replace(best, **{field: tile}), ms
    found["best"] = best_ms
    return best, found


def compiled(make: Callable[[Any], Callable[[], Any]], tile: Any, truth: Any) -> Any:
    """The tile if it compiles, fits and agrees with the first one; else None."""
    try:
        out = make(tile)()[0]
        torch.cuda.synchronize()
        if isinstance(out, tuple):
            out, truth = out[1], truth[1]
        if out.dim() == 3 and out.dtype == torch.float32:
            out, truth = out.sum(0), truth.sum(0)
        return tile if error(out.float(), truth.float()) < 0.02 else None
    except Exception:
        return None


def short(tile: Any) -> str:
    if isinstance(tile, Tile):
        return (
            f"bn{tile.block_n} bk{tile.block_k} k{tile.split_k} w{tile.warps} s{tile.stages}{' bulk' if tile.bulk else ''}"
            f"{' ahead' if tile.ahead else ''}{' early' if tile.early else ''}{' shared' if tile.carveout > 0 else ''}"
        )
    if isinstance(tile, AttentionTile):
        return (
            f"r{tile.rows} k{tile.keys} w{tile.warps} c{tile.combine_rows}/{tile.combine_warps} {str(tile.parts)[6:]}"
            f" e{int(tile.combine_early)}{' shared' if tile.carveout > 0 else ''}"
        )
    return str(tile)


# --- whole policies -----------------------------------------------------------------------------------------------


def policy_phase(settings: list[str], names: list[str], report: dict[str, Any]) -> None:
    """Every setting and plan through the cuda_graph backend, against float32 on the same weights."""
    config = ModelConfig()
    truth, plain = {}, {}
    model = random_model(config)
    wide = float32_copy(model)
    requests = {s: request(SETTINGS[s], config, 7) for s in settings}
    engine = EngineConfig(num_denoise_steps=10, prompt_bucket=8)
    for s, (inputs, noise) in requests.items():
        backend = eager.create(wide, engine)
        truth[s] = backend.denoise(backend.prefill(inputs), noise)
        backend = eager.create(model, engine)
        plain[s] = error(backend.denoise(backend.prefill(inputs), noise), truth[s])
    del wide
    with calibrate.watch(model) as ranges:
        other, noise = request((3, 200, 50), config, 99)
        backend = eager.create(model, engine)
        backend.denoise(backend.prefill(other), noise)
    for name in names:
        plan = calibrate.with_ranges(plans.preset(name), ranges, data="synthetic: probe")
        quantize.apply(model, plan)
        made = cuda_graph.create(model, engine)
        for s, (inputs, noise) in requests.items():
            guarded(policy_row, report, f"{s} {name}", made, inputs, noise, truth[s], plain[s])
            print(s, name, json.dumps(report.get(f"{s} {name}")), flush=True)
        if name != names[-1] and plan.rules:
            model = random_model(config)


def policy_row(
    report: dict[str, Any], key: str, made: Any, inputs: ModelInputs, noise: Tensor, truth: Tensor, plain: float
) -> None:
    actions = made.denoise(made.prefill(inputs), noise)
    whole = made.infer(inputs, noise)
    replay = made.graph_of(inputs, noise)
    same = sum(torch.equal(made.infer(inputs, noise), whole) for _ in range(50))
    changed = replace(inputs, images=255 - inputs.images)
    fresh = not torch.equal(made.infer(changed, noise), whole)
    made.infer(inputs, noise)
    slot = made._slot(cuda_graph.bucket_of(inputs, step=made._step))
    flow_graph = next(iter(slot.flows.values()))[1]
    report[key] = {
        "p50": replay_ms(replay, 100), "vision": replay_ms(slot.vision.replay, 40)["p50"],
        "prefix": replay_ms(slot.prefix.replay, 40)["p50"], "denoise": replay_ms(flow_graph.replay, 40)["p50"],
        "error": error(whole, truth), "error_plain_bf16": plain, "stages_equal_whole": bool(torch.equal(actions, whole)),
        "bit_identical": f"{same}/50", "fresh": fresh, "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "cosine": float(torch.nn.functional.cosine_similarity(whole.flatten(), truth.flatten(), dim=0)),
    }  # fmt: skip


def loop_phase(index: int, text: str, tuned: str, report: dict[str, Any]) -> None:
    """One denoise loop: checked and timed as it is; "tune", "early", "attention": then its variants."""
    T, S, kind = text.split(":")
    fp8 = kind == "fp8"
    loop = make_loop(int(T), int(S), fp8, seed=index)
    start = denoise.TILES[(16 if int(T) <= 16 else denoise.MAX_ROWS, fp8)]
    row = report[text] = {**loop.rows, "default": check_loop(loop, start, replays=100)}
    print(text, {k: v for k, v in row.items() if k != "default"}, json.dumps(row["default"]), flush=True)
    if tuned in ("early", "attention"):
        variants = early_variants(start) if tuned == "early" else attention_variants(start)
        row[tuned] = {name: round(loop.ms(tiles, n=25), 4) for name, tiles in variants.items()}
        print(text, row[tuned], flush=True)
    elif tuned == "explore":
        best = explore(loop, start, row.setdefault("explore", {}), fp8=fp8)
        row["best_tiles"], row["failures"] = {k: short(v) for k, v in vars(best).items()}, loop.rows
        row["best"] = check_loop(loop, best, replays=200)
        print(
            text,
            {k: v for k, v in row["explore"].items() if "start" in k},
            "best",
            json.dumps(row["best"]),
            row["best_tiles"],
        )
    elif tuned == "tune":
        best, row["tuned"] = tune(loop, start, fp8=fp8)
        row["best_tiles"], row["failures"] = {k: short(v) for k, v in vars(best).items()}, loop.rows
        row["best"] = check_loop(loop, best)
        print(text, "best", row["best_tiles"], json.dumps(row["best"]), flush=True)


def guarded(phase: Callable[..., None], *args: Any) -> None:
    """A phase that fails is printed and does not take the next one with it."""
    try:
        phase(*args)
    except Exception:
        traceback.print_exc()


def environment() -> dict[str, Any]:
    import triton

    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"gpu": smi.stdout.strip(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
            "python": sys.version.split()[0]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--phases", default="denoise,policy")
    parser.add_argument("--loops", default="50:968:bf16,50:968:fp8,10:560:bf16,10:560:fp8")
    parser.add_argument("--settings", default="3,200,50")
    parser.add_argument("--plans", default="bf16")
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment(), "denoise": {}, "policy": {}}
    phases, begin = args.phases.split(","), time.perf_counter()
    try:
        for index, text in enumerate(args.loops.split(",") if "denoise" in phases else []):
            T, S, kind, *more = text.split(":")
            guarded(loop_phase, index, f"{T}:{S}:{kind}", (more or [""])[0], report["denoise"])
            torch.cuda.empty_cache()
            print(f"-- {time.perf_counter() - begin:.0f} s", flush=True)
        if "policy" in phases:
            torch.cuda.empty_cache()
            guarded(policy_phase, args.settings.split(";"), args.plans.split(","), report["policy"])
    finally:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1, default=str)
    print(f"-- {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
