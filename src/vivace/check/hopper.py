"""`vivace bench --preset hopper`: the whole policy at full size with random weights, timed, proven and weighed in one run.

Needs no checkpoint and none of the command line's own packages: `python -m vivace.check.hopper --out FILE` does the same.

The file (kind "hopper") is written after every row, so what was measured survives an interrupt:

    setup       how weights, requests and ranges were made; seed; calls; phases; estimated_s
    ceilings    bf16_tflops, fp8_tflops, copy_gb_s that torch reaches here on large work; published: the datasheet's
    rows[]      setting, engine, precision, boundary B0|B0 reuse|B1|B2|B3|B3 openpi, batch, steps, calls (behind the
                percentiles), latency {p50_ms, p95_ms, p99_ms, max_ms, min_ms, mean_ms, samples}, clock, stable,
                bit_identical {same, of, output_poisoned}; at B0 also launches {exposed, of}, stages_ms and rates per
                stage {tflop, gb, fp8_share, tflop_s, gb_s, floor_ms, of_floor}; at B2 parts_ms, what the policy says
                of its own parts; at B3 and B3 openpi server_p50_ms, its `policy.infer`, and added_ms, B3 - B2
                rivals ("compiled graph", and "eager": plain PyTorch) at B0, B1 and B2, without rates and marks;
                "realtime-vla", if a clone of it is named, at B0, with a mark for the headline plan's ratio:
                ours_in_the_same_rounds {engine: {p50_ms, ratio}}, ratio = the rival's p50 over ours; compile_mode
    accuracy[]  setting, engine, precision, observations, noise_draws, cosine_mean, cosine_worst, rel_l2, rel_l2_worst,
                plain_bfloat16 {the same four of plain PyTorch in bfloat16}, infer_is_two_calls {same, of}: infer, infer
                after look, and denoise(prefill) give the same bits
    coverage[]  setting, engine, precision, kernels {layer operation: kernel}, summary, parts[], by_torch[]: no own kernel
    proof[]     setting, engine, fresh {change: the actions changed}, fresh_policy, poisoned {bytes, replays, same,
                ways {way to the actions: {replays, same}}}, passed
    memory[]    engine, weights_bytes, kv_bytes, peak_serving_bytes, peak_reserved_bytes, ratio (reserved), ratio_allocated
    soak[]      setting, engine, calls, latency, p50_of_tenths_ms, policy_calls, policy_latency, allocated_growth_bytes,
                reserved_growth_bytes, checks {same, of, output_poisoned}
    start[]     caches cold|warm, imported_s, weights_s, first_action_s, every_bucket_s: seconds after the process began;
                and the memory of that process, which did nothing else
    not_run[]   phase, what, why, informational     phase_seconds     missed[]: every "must" that is not met
    finished    false: ended from outside, and settings without a row are nowhere named     passed

Rows carry targets[]: {what, got, rule, must, stretch, must_met, stretch_met}. `check.targets` says where they come from.
`passed`: finished, no must is missed and nothing is in not_run but what is informational: what this program can never run,
openpi's client where it is not installed, and rivals that were not asked for, on which no mark hangs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.sizes import network
from ..errors import ConfigError
from ..precision import calibrate
from ..precision import plan as plans
from . import environment, hopper_estimate, hopper_machine, hopper_proof, hopper_realtime_vla, hopper_rows, hopper_warm
from .gpus import match_gpu
from .hopper_engines import COMPILE_MODES, CONFIG, model_inputs, plans_of, ranges_of
from .hopper_phases import PHASES
from .hopper_robot import Scenes, request, toy_tokenizer
from .hopper_run import Options, Run, noise
from .hopper_weights import DESCRIPTION, load, random_checkpoint
from .results import result
from .targets import SIZES, Size, parse_size

PLANS = ("bf16", "fp8-mlp", "fp8-full", "fp8-prefix+vision", "fp8-all")
NUMBERS = {
    "calls": "of our engines at B0", "host_calls": "of our engines at B1, B2 and B3 each",
    "few_calls": "of the other plans, at B0", "few_settings": "in which the other plans are measured",
    "few_observations": "for the accuracy of the other plans", "reuse_calls": "of the denoise stage alone",
    "rival_calls": "of torch.compile and, in turn with it, of ours, at B0, B1 and B2 each",
    "rival_settings": "in which torch.compile is timed: the first ones",
    "plain_calls": "of plain PyTorch, 0.2 s each, and, in turn with it, of one of ours, at B0, B1 and B2 each",
    "plain_settings": "in which plain PyTorch is timed: the first ones", "soak_calls": "in a row",
    "observations": "for accuracy", "draws": "of noise for each of them", "calibration": "observations for FP8 ranges",
    "seed": "of weights, scenes and noise", "outliers": "loud channels per stack",
}  # fmt: skip
"""Options that are numbers, and what they say of themselves."""
AT_MOST_RIVALS = 5
NEEDS_GPU = ("rivals", "soak", "memory", "start")


def run(
    options: Options, *, phases: Sequence[str] = tuple(PHASES), size: str = "full", device: str = "cuda",
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Measure, write `options.out` after every row, and return the document.

    Raises ConfigError for an unknown phase, plan or network size, where there is no such device, and where a clone of
    realtime-vla is named that is none.
    """
    if unknown := sorted(set(phases) - set(PHASES)):
        raise ConfigError("unknown phase", got=", ".join(unknown), wanted=f"some of {list(PHASES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this preset needs an NVIDIA GPU", got="no CUDA device", do="run it on the GPU machine")
    if torch.device(device).index:
        raise ConfigError(
            "timers and child processes use the first GPU", got=device, wanted="cuda or cpu",
            do=f"set CUDA_VISIBLE_DEVICES={torch.device(device).index} and use --device cuda",
        )  # fmt: skip
    if options.realtime_vla is not None:
        hopper_realtime_vla.require(options.realtime_vla)
    if twice := _same_graphs(options.sizes):
        raise ConfigError(
            "two settings run in the same graphs, so what they are made of could be recorded for one only",
            got=" and ".join(size.name for size in twice), wanted="other views, chunk or bucket of prompt tokens",
        )  # fmt: skip
    estimated = hopper_estimate.seconds(options, phases)
    if sum(estimated.values()) > options.seconds:
        tell(f"about {sum(estimated.values()):.0f} s of work in {options.seconds:g} s: what does not fit is not run")
    with torch.no_grad():
        warm = [name for name in ("rows", "rivals") if name in phases and size == "full"]
        made = _prepared(options, size=size, device=torch.device(device), tell=tell, warm=warm)
        made.document["setup"] |= {"phases": list(phases), "estimated_s": estimated}
        for name in (name for name in PHASES if name in phases):
            if name in NEEDS_GPU and device == "cpu":
                made.skip(name, "all", "needs a GPU")
                continue
            PHASES[name](made)
            tell(f"-- {name} done, {made.left_s:.0f} s left")
    made.document |= {"state_after": environment.snapshot(), "finished": True}
    made.write()
    return made.document


def _same_graphs(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """The first two settings that share a bucket of graphs; () if none do."""
    seen: dict[tuple[int, int, int], Size] = {}
    for size in sizes:
        key = size.views, -(-size.prompt_tokens // CONFIG.prompt_bucket), size.horizon
        if key in seen:
            return seen[key], size
        seen[key] = size
    return ()


def _prepared(
    options: Options, *, size: str, device: torch.device, tell: Callable[[str], None], warm: Sequence[str]
) -> Run:
    """Weights, plans with ranges, float32 truth and plain bfloat16 of every setting; kernels of the phases `warm`."""
    begin, config = time.perf_counter(), network(size, "pi05", horizon=options.sizes[0].horizon)  # type: ignore[arg-type]
    checkpoint = random_checkpoint(config, seed=options.seed, outliers=options.outliers)
    count = options.calibration + options.observations
    made = Run(
        options=options, config=config, device=device, checkpoint=checkpoint,
        network=load(checkpoint, device=device, precision="bfloat16"), tokenizer=toy_tokenizer(config.vocab_size),
        scenes=Scenes.make(count, views=3, image_size=config.vision.image_size, seed=options.seed),
        document=_envelope(options, size, device), begin=begin, tell=tell,
    )  # fmt: skip
    tell(f"weights and scenes: {time.perf_counter() - begin:.0f} s")
    made.plans = _plans(made)
    tell(f"ranges: {time.perf_counter() - begin:.0f} s")
    _tidy(device)
    helpers = _compiling(made, warm) if device.type == "cuda" else []
    _truth(made)
    made.document["remarks"] = hopper_warm.finish(helpers, tell=tell)
    tell(f"float32 and plain bfloat16 actions of {len(options.sizes)} settings: {time.perf_counter() - begin:.0f} s")
    made.document["phase_seconds"] = {"setup": round(time.perf_counter() - begin, 1)}
    made.write()
    return made


def _envelope(options: Options, size: str, device: torch.device) -> dict[str, Any]:
    ceilings = hopper_machine.ceilings(device)
    gpu = match_gpu(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    body = {
        "preset": "hopper",
        "setup": {
            "network": f"pi05 {size}", "weights": f"{DESCRIPTION}; {options.outliers} channels, seed {options.seed}",
            "engine": {"num_denoise_steps": CONFIG.steps, "prompt_bucket": CONFIG.prompt_bucket}, "batch": 1,
            "requests": "made-up scenes of 224 x 224 uint8, state of 7, prompt of exactly the setting's tokens",
            "ranges": f"amax over {options.calibration} observations that no accuracy row uses",
            "calls": {
                "B0": options.calls, "B1, B2 and B3": options.host_calls, "B0 of other plans": options.few_calls,
                "B0 reuse": options.reuse_calls, "rivals": options.rival_calls, "plain PyTorch": options.plain_calls,
                "soak": options.soak_calls,
            },
            "graphs": "as a warmed-up server has them: masks are read, prompts padded to their bucket",
            "commit": options.commit or None, **hopper_realtime_vla.version(options.realtime_vla),
            "method": "rounds over engines in random order; garbage collected before the samples, off while they are taken",
        },
        "ceilings": ceilings, "published": hopper_rows.published(gpu), "state_before": environment.snapshot(),
        "rows": [], "accuracy": [], "not_run": [], "finished": False,
    }  # fmt: skip
    return result("hopper", body, environment=environment.collect())


def _plans(made: Run) -> list[Any]:
    """None for bfloat16, presets with measured ranges, and plans from files (ranges added where a file has none)."""
    options = made.options
    ranges = ranges_of(made.base(), _calibration(made))
    wanted = [name for name in options.plans if name != "bf16"]
    found: list[Any] = [None] if "bf16" in options.plans else []
    found += plans_of(wanted, ranges, data="synthetic: full-size benchmark")
    for path in options.plan_files:
        plan = replace(plans.read(path), name=path.stem)
        found.append(plan if plan.amax else calibrate.with_ranges(plan, ranges, data="synthetic: full-size benchmark"))
    return found


def _calibration(made: Run) -> list[Any]:
    """Observations for the ranges: every setting in turn, none of those that accuracy is measured on."""
    o, found = made.options, []
    for index in range(o.calibration):
        size = o.sizes[index % len(o.sizes)]
        pipe = made.pipe(size)
        one = model_inputs(pipe, request(pipe, size, made.scenes, index, seed=o.seed), device=made.device)
        found.append((one, noise((1, size.horizon, 32), seed=1000 + index, device=made.device)))
    return found


def _compiling(made: Run, phases: Sequence[str]) -> list[hopper_warm.Helper]:
    """Processes that fill the kernel caches while float32 actions are computed here.

    Each holds a network, so beside ours there is room for one rival; a rival's setting takes longer than all of ours.
    """
    o = made.options
    headline = next((plan for plan in made.plans if plan is not None and plan.name == o.headline), None)
    ours = o.sizes if "rows" in phases else ()
    rivals = o.sizes[: min(1 if ours else AT_MOST_RIVALS, o.rival_settings)] if "rivals" in phases else ()
    return hopper_warm.begin(
        ours, headline, rivals=rivals, seed=o.seed, outliers=o.outliers, compile_mode=o.compile_mode
    )


def _truth(made: Run) -> None:
    """Float32 actions first, then the float32 network is let go; it must not count in any engine's memory."""
    wide = load(made.checkpoint, device=made.device, precision="float32")
    _tidy(made.device)
    for size in made.options.sizes:
        made.truth[size.name] = hopper_proof.reference(wide, made.held_out(size))
    del wide
    _tidy(made.device)
    for size in made.options.sizes:
        made.plain[size.name] = hopper_proof.reference(made.base(), made.held_out(size))


def _tidy(device: torch.device) -> None:
    """Blocks that nobody uses go back to the device, where other processes want them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vivace.check.hopper`."""
    made = argparse.ArgumentParser(description="Full-size pi0.5 with random weights: speed, accuracy, memory, start.")
    made.add_argument("--out", type=Path, required=True, help="the result")
    made.add_argument("--settings", default=";".join(SIZES), help="VIEWS,TOKENS,CHUNK separated by ;")
    made.add_argument("--plans", default=",".join(PLANS), help="bf16, presets, and files of plans, by commas")
    made.add_argument("--headline", default="fp8-all", help="the FP8 plan that gets all calls in every setting")
    made.add_argument("--phases", default=",".join(PHASES))
    made.add_argument("--seconds", type=float, default=Options.seconds, help="what would begin later is not run")
    made.add_argument("--realtime-vla", type=Path, help="a clone of that project, whose code is then run beside ours")
    made.add_argument("--compile-mode", default=Options.compile_mode, choices=COMPILE_MODES, help="of torch.compile")
    made.add_argument("--commit", default=Options.commit, help="of the code, where this copy of it has no git")
    made.add_argument("--network", default="full", help="a size of make-checkpoint")
    made.add_argument("--device", default="cuda")
    for name, what in NUMBERS.items():
        default = getattr(Options, name)
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{what} ({default})")
    return made


def options_of(given: argparse.Namespace) -> Options:
    """The record behind a command line."""
    named = [text for text in given.plans.split(",") if text]
    return Options(
        out=given.out, sizes=tuple(parse_size(text) for text in given.settings.split(";")),
        plans=tuple(name for name in named if name in plans.PRESETS),
        plan_files=tuple(Path(name) for name in named if name not in plans.PRESETS), headline=given.headline,
        seconds=given.seconds, commit=given.commit, compile_mode=given.compile_mode,
        realtime_vla=given.realtime_vla,
        **{name: getattr(given, name) for name in NUMBERS},
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything ran and every must is met."""
    given = parser().parse_args(arguments)
    document = run(
        options_of(given), phases=given.phases.split(","), size=given.network, device=given.device,
        tell=lambda text: print(text, flush=True),
    )  # fmt: skip
    for line in document["missed"]:
        print(f"MISSED {line}")
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
