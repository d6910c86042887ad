"""Products whose weights arrive before the wait, against today's table: one product in a chain, then inside the whole loop.

    PYTHONPATH=src:benchmarks python benchmarks/ahead_probe.py --out ahead.json --loops 10:560:bf16,10:560:fp8

Right before fast: every product is compared with float32 on buffers poisoned with NaN, every timed loop with the float32
loop, and the replays of the last one bit by bit. "trigger" means that norm, attention and combine too let their successor
start before their own wait; their source is rewritten for that here, so that one file decides.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from gpu_probe import Loop, captured, chain_us, environment, error, make_loop, poisoned, replay_ms

from vivace.ops import denoise, denoise_ahead, denoise_gemm
from vivace.ops.denoise import Tiles
from vivace.ops.denoise_ahead import AheadTile
from vivace.ops.table import reference_ops

BEGIN = time.perf_counter()
LIMIT_S = 66.0
PLAIN = {name: getattr(denoise, name) for name in ("denoise_gemm", "denoise_norm", "denoise_attention")}
PRODUCTS = ("qkv", "o", "gate_up", "down")


def candidates(T: int, fp8: bool) -> dict[str, list[AheadTile]]:
    """The first of each is the one that goes into the loop alone."""
    A = AheadTile
    if T <= 16:
        return {
            "qkv": [A(16, warps=w, bars=b) for w, b in ((4, 1), (8, 1), (4, 4))]
            + [A(8), A(8, warps=8), A(32, warps=8)],
            "o": [A(32, 4), A(32, 4, warps=8), A(64, 8), A(32, 4, bars=2), A(16, 2, warps=8)],
            "gate_up": [A(32), A(32, warps=8), A(32, bars=4), A(16), A(16, warps=8), A(32, warps=8, bars=2)],
            "down": [A(32, 4), A(32, 4, warps=8), A(64, 8), A(64, 8, warps=8), A(32, 8), A(32, 4, bars=4)],
        }
    wide = 8 if fp8 else 6
    return {
        "qkv": [A(16, each=2, slots=4), A(8, each=2, slots=4), A(16, each=2, slots=8), A(16, each=4, slots=2)],
        "o": [A(32, 4, each=2, slots=4), A(32, 4, each=1, slots=8), A(64, 8, each=1, slots=4)],
        "gate_up": [A(32, each=2, slots=4), A(32, each=1, slots=8), A(32, each=2, slots=wide), A(16, each=2, slots=4)],
        "down": [
            A(32, 4, each=2, slots=4),
            A(32, 4, each=2, slots=8),
            A(64, 8, each=2, slots=4),
            A(32, 8, each=2, slots=4),
        ],
    }


def dispatch() -> SimpleNamespace:
    """denoise_gemm, with tiles of the new kind going to the new kernels."""
    made = SimpleNamespace(**{k: v for k, v in vars(denoise_gemm).items() if not k.startswith("__")})
    for name in ("parts", "geglu", "qkv"):
        old, new = getattr(denoise_gemm, name), getattr(denoise_ahead, name)
        setattr(made, name, lambda *args, old=old, new=new: (new if isinstance(args[-1], AheadTile) else old)(*args))
    return made


def triggered(name: str, folder: str) -> ModuleType:
    """A module of kernels that let their successor start right before their own wait."""
    source = Path(PLAIN[name].__file__).read_text()
    source, count = re.subn(r"(?m)^( +)gdc_wait\(\)$", r"\1gdc_launch_dependents()\n\1gdc_wait()", source)
    assert count, name
    path = Path(folder) / f"{name}_triggered.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"vivace.ops.{name}_triggered", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def surroundings(modules: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(denoise, name) for name in modules}
    for name, module in modules.items():
        setattr(denoise, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            setattr(denoise, name, module)


def left() -> float:
    return LIMIT_S - (time.perf_counter() - BEGIN)


def chain_inputs(loop: Loop) -> dict[str, Callable[[Any], Callable[[], list[Any]]]]:
    """field -> tile -> a function that runs the product for every layer, each with its own weights."""
    from vivace.ops import reference

    made, T, blocks = dispatch(), loop.T, [loop.model.expert.block(i) for i in range(18)]
    rope = tuple(table.reshape(T, -1) for table in loop.model.suffix_context(loop.cache, T).rope)
    first, cuda = blocks[0], torch.device("cuda")
    x, n, mixed, hidden = (
        reference.hand_over(torch.randn(T, width, device=cuda).bfloat16(), layer)
        for width, layer in ((1024, first.qkv), (1024, first.gate_up), (2048, first.o), (4096, first.down))
    )
    run: dict[str, Callable[[Any, Any], Any]] = {
        "qkv": lambda b, t: made.qkv(x, b.qkv, rope, (8, 1, 256), t),
        "o": lambda b, t: made.parts(mixed, b.o, t),
        "gate_up": lambda b, t: made.geglu(n, b.gate_up, b.down, t),
        "down": lambda b, t: made.parts(hidden, b.down, t),
    }
    return {field: lambda tile, one=one: lambda: [one(b, tile) for b in blocks] for field, one in run.items()}


def chains(loop: Loop, start: Tiles, row: dict[str, Any]) -> dict[str, list[AheadTile]]:
    """Check and time each product alone; what agrees, fastest first."""
    kept: dict[str, list[AheadTile]] = {}
    make = chain_inputs(loop)
    tiles = candidates(loop.T, loop.rows["fp8"])
    jobs = [(field, tile) for field in PRODUCTS for tile in tiles[field]]
    with ThreadPoolExecutor(12) as pool:
        failures = dict(zip(jobs, pool.map(lambda job: attempt(make[job[0]](job[1])), jobs), strict=True))
    torch.cuda.synchronize()
    for field in PRODUCTS:
        truth = made_float(make[field](getattr(start, field))())
        found = row[field] = {"today": {"us": round(chain_us(make[field](getattr(start, field))), 3)}}
        times = []
        for tile in tiles[field]:
            note: dict[str, Any] = {}
            found[short(tile)] = note
            if failures[field, tile] is not None:
                note["failure"] = failures[field, tile]
                continue
            with poisoned():
                got = made_float(make[field](tile)())
            again = made_float(make[field](tile)())
            note["error"] = max(error(g, t) for g, t in zip(got, truth, strict=True))
            note["same_bits"] = all(torch.equal(g, a) for g, a in zip(got, again, strict=True))
            if note["error"] < 0.02:
                note["us"] = round(chain_us(make[field](tile)), 3)
                times.append((note["us"], short(tile), tile))
        kept[field] = [tile for _, _, tile in sorted(times, key=lambda t: t[:2])]
    return kept


def attempt(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except Exception as failure:
        return repr(failure)[:300]
    return None


def made_float(outs: list[Any]) -> list[torch.Tensor]:
    return [(out.sum(0) if out.dim() == 3 else out).float() for out in outs]


def short(tile: AheadTile) -> str:
    return f"bn{tile.block_n} k{tile.split_k} w{tile.warps} b{tile.bars} e{tile.each} s{tile.slots}{'' if tile.early else ' late'}"


def loop_ms(loop: Loop, tiles: Tiles, modules: dict[str, Any], *, replays: int = 0) -> dict[str, Any]:
    """Checked against float32, then timed; with `replays` compared bit by bit."""
    ops = denoise.denoise_ops(reference_ops(), tiles)
    bound = 1.5 * loop.rows["error_fp8_reference" if loop.rows["fp8"] else "error_plain_bf16"]
    with surroundings(modules):
        note: dict[str, Any] = {}
        if replays:
            with poisoned():
                note["error_poisoned"] = error(loop.run(ops), loop.truth)
        graph, out = captured(lambda: loop.run(ops))
    graph.replay()
    torch.cuda.synchronize()
    note["error"] = error(out, loop.truth)
    if not note["error"] < bound:
        return note
    note["ms"] = round(replay_ms(graph.replay, 40)["p50"], 4)
    if replays:
        first, same = out.clone(), 0
        for _ in range(replays):
            out.fill_(float("nan"))
            graph.replay()
            same += int(torch.equal(out, first))
        note["bit_identical_replays"] = f"{same}/{replays}"
    return note


def variants(
    start: Tiles, best: dict[str, AheadTile], early: dict[str, Any]
) -> dict[str, tuple[Tiles, dict[str, Any]]]:
    """name -> (tiles, rewritten modules). Neighbours trigger before their wait unless the name says otherwise."""
    plain: dict[str, Any] = {"denoise_gemm": dispatch()}
    every = {**plain, **early}
    late = {field: replace(tile, early=False) for field, tile in best.items()}
    return {
        "today": (start, {}),
        "today, triggers early": (start, every),
        "all": (replace(start, **best), every),
        "all, neighbours as today": (replace(start, **best), plain),
        "all, products trigger late": (replace(start, **late), every),
        "gate_up late": (replace(start, **{**best, "gate_up": late["gate_up"]}), every),
        **{f"only {field}": (replace(start, **{field: tile}), every) for field, tile in best.items()},
        **{f"all but {field}": (replace(start, **{**best, field: getattr(start, field)}), every) for field in best},
        "all, equal divisions": (
            replace(denoise.shared(start), **{f: replace(t, carveout=100) for f, t in best.items()}),
            every,
        ),
        "all, norm as today": (replace(start, **best), {k: v for k, v in every.items() if k != "denoise_norm"}),
        "all, attention as today": (
            replace(start, **best),
            {k: v for k, v in every.items() if k != "denoise_attention"},
        ),
    }


def phase(text: str, early: dict[str, Any], report: dict[str, Any], args: argparse.Namespace) -> None:
    T, S, kind = text.split(":")
    fp8, row = kind == "fp8", report.setdefault(text, {})
    loop = make_loop(int(T), int(S), fp8, seed=1)
    start = denoise.TILES[(16 if int(T) <= 16 else denoise.MAX_ROWS, fp8)]
    row["checks"], row["chains"], row["loops"] = loop.rows, {}, {}
    kept = chains(loop, start, row["chains"])
    print(text, f"{time.perf_counter() - BEGIN:.0f} s", json.dumps(row["chains"]), flush=True)
    best = {field: tiles[0] for field, tiles in kept.items() if tiles}
    ready = early
    for name, (tiles, modules) in variants(start, best, ready).items() if len(best) == 4 else ():
        if left() < 6:
            break
        row["loops"][name] = guarded(lambda t=tiles, m=modules: loop_ms(loop, t, m))
    print(text, f"{time.perf_counter() - BEGIN:.0f} s", json.dumps(row["loops"]), flush=True)
    times = [(note["ms"], name) for name, note in row["loops"].items() if "ms" in note]
    if times and left() > 6:
        tiles, modules = variants(start, best, ready)[min(times)[1]]
        chosen = dict(best) if min(times)[1].startswith("all") else {}
        fastest = min(times)[0]
        for field in chosen:
            for tile in kept[field][1:3]:
                if left() < 8:
                    break
                trial = replace(tiles, **{field: tile})
                note = row["loops"][f"{field} {short(tile)}"] = guarded(lambda t=trial: loop_ms(loop, t, modules))
                if note.get("ms", 1e9) < fastest - 0.01:
                    tiles, fastest = trial, note["ms"]
        row["best"] = {
            "tiles": {
                f: short(getattr(tiles, f)) if isinstance(getattr(tiles, f), AheadTile) else "today" for f in PRODUCTS
            }
        }
        row["best"] |= guarded(lambda: loop_ms(loop, tiles, modules, replays=args.replays))
        print(text, f"{time.perf_counter() - BEGIN:.0f} s", json.dumps(row["best"]), flush=True)


def final(text: str, early: dict[str, Any], report: dict[str, Any], args: argparse.Namespace) -> None:
    """Today and the chosen tiles, in turns, then replays of the chosen bit by bit."""
    T, S, kind = text.split(":")
    fp8, row = kind == "fp8", report.setdefault(text, {})
    loop = make_loop(int(T), int(S), fp8, seed=1)
    start = denoise.TILES[(16 if int(T) <= 16 else denoise.MAX_ROWS, fp8)]
    cuts = denoise_ahead.tiles_for(int(T), loop.model.expert.block(0).o)
    best = {field: getattr(cuts, field) for field in PRODUCTS}
    table = variants(start, best, early)
    names = (
        "today",
        "all",
        "all, equal divisions",
        "all, norm as today",
        "all, attention as today",
        "all, neighbours as today",
        "all but down",
    )
    graphs: dict[str, Any] = {}
    row["checks"], row["tiles"] = loop.rows, {field: short(tile) for field, tile in best.items()}
    for name in names:
        tiles, modules = table[name]
        ops = denoise.denoise_ops(reference_ops(), tiles)
        with surroundings(modules):
            if name == "all":
                with poisoned():
                    row["error_poisoned"] = error(loop.run(ops), loop.truth)
            graphs[name] = captured(lambda ops=ops: loop.run(ops))
        graphs[name][0].replay()
        torch.cuda.synchronize()
        row[name] = {"error": error(graphs[name][1], loop.truth), "ms": []}
    for _ in range(3):
        for name in names:
            row[name]["ms"].append(round(replay_ms(graphs[name][0].replay, 25)["p50"], 4))
    graph, out = graphs["all"]
    graph.replay()
    torch.cuda.synchronize()
    first, same, count = out.clone(), torch.zeros((), dtype=torch.int64, device="cuda"), 0
    while count < args.replays and left() > 3:
        out.fill_(float("nan"))
        graph.replay()
        same += (out == first).all()
        count += 1
    row["bit_identical_replays"] = f"{int(same)}/{count}"
    row["long_ms"] = replay_ms(graph.replay, 100)
    print(text, f"{time.perf_counter() - BEGIN:.0f} s", json.dumps(row), flush=True)


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as failure:
        traceback.print_exc()
        return {"failure": repr(failure)[:300]}


def main() -> None:
    global LIMIT_S
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--loops", default="10:560:bf16,10:560:fp8,50:968:bf16,50:968:fp8")
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--final", action="store_true", help="only the chosen tiles, in turns with today's")
    parser.add_argument("--limit", type=float, default=66.0)
    args = parser.parse_args()
    LIMIT_S = args.limit
    report: dict[str, Any] = {"environment": environment(), "loops": {}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        early = {name: triggered(name, folder) for name in ("denoise_norm", "denoise_attention")}
        for text in args.loops.split(","):
            if left() > 12:
                run = final if args.final else phase
                guarded(lambda text=text, run=run: run(text, early, report["loops"], args) or {})
            Path(args.out).write_text(json.dumps(report, indent=1, default=str))
            torch.cuda.empty_cache()
    print(f"-- {time.perf_counter() - BEGIN:.0f} s in all")


if __name__ == "__main__":
    main()
