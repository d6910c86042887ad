"""`vivace build PATH`: TensorRT engines of a policy, also for GPUs that are not here, and what each product computes in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.progress import Progress
from rich.table import Table

from ..check import environment
from ..check.results import result
from ..config import TensorRTBase, TensorRTConfig
from ..errors import ConfigError, Unsupported
from .output import OK, console, deliver, refuse_output, refuse_output_folder, show_coverage
from .policy_args import CheckpointArgs

if TYPE_CHECKING:
    from ..backends.tensorrt.module import Module
    from ..backends.tensorrt.networks import Part, Shapes
    from ..backends.tensorrt.run import Made, Recipe
    from ..backends.tensorrt.targets import Target
    from ..checkpoints.source import Checkpoint
    from ..precision.plan import PrecisionPlan
    from ..types import RobotIO


@dataclass(frozen=True)
class Args:
    """Build TensorRT engines, here or for other GPUs, and check that every matrix product runs as the plan says.

    Example: vivace build my_checkpoint --target sm89,sm120 --precision plan.json -o build.json
    """

    path: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    target: str = "current"
    """current = the GPU of this machine, or others by compute capability, such as sm89,sm120 (TensorRT-RTX only)."""
    precision: str = "auto"
    """bfloat16, bfloat16+vision, float32, auto = what the checkpoint declares, or a plan file (vivace calibrate)."""
    parts: str = "vision,prefix,step"
    """Which networks; loop = all denoise steps in one engine, which takes minutes at full size."""
    views: int | None = None
    """Views per observation; default: the robot's cameras."""
    prompts: str = ""
    """Prompt tokens to build for, e.g. 64,128; default: every bucket up to the longest prompt."""
    engines: Path | None = None
    """Write engines there; default: the folder where the backend looks for them."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""
    tensorrt: tyro.conf.OmitArgPrefixes[TensorRTConfig] = field(default_factory=TensorRTConfig)
    checkpoint: tyro.conf.OmitArgPrefixes[CheckpointArgs] = field(default_factory=CheckpointArgs)


@dataclass(frozen=True)
class Source:
    """What the engines are made of."""

    recipe: Recipe
    plan: PrecisionPlan | None
    facts: dict[str, Any]


def run(args: Args) -> int:
    """Build every engine, or find it built already; print a table; write the result."""
    from ..backends.tensorrt import cache, run, targets
    from ..backends.tensorrt import module as modules
    from ..checkpoints.open import open_checkpoint

    refuse_output(args.output)
    where = args.engines if args.engines is not None else cache.folder()
    refuse_output_folder(where)
    _chosen_parts(args.parts)
    _chosen_prompts(args.prompts)
    if args.views is not None and args.views < 1:
        raise ConfigError("views per observation", got=args.views, wanted="1 or more")
    wanted = targets.parse(args.target)
    module = modules.load("tensorrt_rtx" if wanted and args.tensorrt.module == "auto" else args.tensorrt.module)
    if not wanted:
        targets.here()  # says what is missing before a checkpoint is read
    opened = open_checkpoint(
        args.path, horizon=args.checkpoint.horizon, vision_heads=args.checkpoint.vision_heads,
        lerobot_version=args.checkpoint.lerobot_version,
    )  # fmt: skip
    source = _source(args, opened, module, wanted)
    _refuse_formats(args, source.recipe, wanted or [targets.here()])
    made, begin = [], time.perf_counter()
    with Progress(console=console, transient=True) as bar:
        for part, shapes in _networks(args, opened, baked=source.recipe.baked):
            task = bar.add_task(f"{part}: writing", total=1.0)

            def show(phase: str, done: float, task: Any = task, part: str = part) -> None:
                bar.update(task, completed=done, description=f"{part}: {phase}")

            made.append(
                run.make(source.recipe, part, shapes, targets=wanted, where=where, facts=source.facts, progress=show)
            )
            bar.update(task, completed=1.0, description=part)
    _finish(args, source, made, seconds=time.perf_counter() - begin)
    return OK


def _finish(args: Args, source: Source, made: Sequence[Made], *, seconds: float) -> None:
    coverage = _coverage(source, made)
    body = {
        "checkpoint": str(args.path),
        "target": args.target,
        **source.facts,
        "engines": [_row(one) for one in made],
        "seconds": round(seconds, 2),
        "coverage": coverage,
    }
    _show(made, source, seconds)
    show_coverage(coverage, title="what the networks compute in (nothing was run)")
    document = result("build", body, environment=environment.collect())
    deliver(document, args.output)


def _row(one: Made) -> dict[str, Any]:
    return {
        "part": one.network.part, "label": one.network.label, "path": str(one.path), "bytes": len(one.engine),
        "layers": one.network.definition.num_layers, "products": len(one.products),
        "build_seconds": round(one.seconds, 3), "found_on_disk": one.seconds == 0.0, "refused": list(one.refused),
    }  # fmt: skip


def _show(made: Sequence[Made], source: Source, seconds: float) -> None:
    table = Table(title=f"{source.facts['module']}: {source.facts['base']}, weights as {source.facts['weights']}")
    for head in ("network", "MB", "products", "seconds"):
        table.add_column(head, justify="left" if head == "network" else "right")
    for one in made:
        took = f"{one.seconds:.1f}" if one.seconds else "on disk"
        table.add_row(one.network.label, f"{len(one.engine) / 1e6:.2f}", str(len(one.products)), took)
    console.print(table)
    console.print(f"{len(made)} engines in {seconds:.1f} s, in {made[0].path.parent}", markup=False, soft_wrap=True)


def _coverage(source: Source, made: Sequence[Made]) -> list[dict[str, Any]]:
    """The audit as the table of every engine: of the networks with the longest prompt."""
    from ..backends.tensorrt import audit
    from ..precision.coverage import Coverage, as_json, rows

    seen = Coverage(kernel=source.recipe.module.name)
    for one in made:
        audit.record(seen, one.products, part=one.network.part, kernel=source.recipe.module.name)
    return as_json(rows(seen, steps=source.facts["steps"], plan=source.plan))


# --- what is built ----------------------------------------------------------------------------------------------------


def _source(args: Args, opened: Checkpoint, module: Module, wanted: Sequence[Target]) -> Source:
    from ..backends.tensorrt import run
    from ..checkpoints.fingerprint import fingerprint
    from ..model.weights import slots
    from ..runtime import precision as precisions

    precision = precisions.resolve(args.precision, opened)
    base = _base(args, precision.dtype, wanted)
    baked = run.is_baked(args.tensorrt, module)
    digest = ""
    if precision.plan is not None or baked:
        with console.status("reading the weights to know which they are"):
            used = slots(opened.model)  # what loading reads, and so what a plan's hash is of
            digest = fingerprint({name: ref for name, ref in opened.tensors.items() if name in used})
    recipe = _with_weights(args, opened, module, base) if baked else _without(args, opened, module, base, digest)
    facts = {
        "module": module.label, "base": base, "weights": "baked" if baked else "inputs",
        "fused": args.tensorrt.fused, "checkpoint_hash": digest, "precision": precision.label,
        "plan_hash": precision.plan.digest if precision.plan else None, "steps": opened.num_denoise_steps or 10,
    }  # fmt: skip
    return Source(recipe, precision.plan, facts)


def _refuse_formats(args: Args, recipe: Recipe, targets: Sequence[Target]) -> None:
    """Raise Unsupported if the plan puts a layer of the chosen parts into a type that a target lacks: before any build."""
    import torch

    from ..backends.tensorrt.targets import check_types
    from ..precision.fit import all_layers

    stacks = {"vision": ("vision.", "projector"), "prefix": ("prefix.",), "step": ("expert.",), "loop": ("expert.",)}
    layers = tuple(name for part in _chosen_parts(args.parts) for name in stacks[part])
    chosen = [name for name in all_layers(recipe.outlined) if name.startswith(layers)]
    if "e4m3" in recipe.plan.formats(chosen).values():
        check_types(targets, types=[torch.float8_e4m3fn], module=recipe.module)


def _with_weights(args: Args, opened: Checkpoint, module: Module, base: TensorRTBase) -> Recipe:
    """Weights go into the engines, so they are loaded, quantised and kept."""
    import torch

    from ..backends.tensorrt import run
    from ..checkpoints.fingerprint import Fingerprint
    from ..runtime import precision as precisions
    from ..runtime.policy import load_model

    precision, seen = precisions.resolve(args.precision, opened), Fingerprint()
    _refuse_scales(precision.plan)
    with console.status("loading the weights"):
        model = load_model(opened, device=torch.device("cpu"), precision=precision.dtype, seen=seen)
        precisions.quantise(model, precision, checkpoint_hash=seen.digest())
    return run.recipe(model, module, args.tensorrt, base=base, plan=precision.plan)


def _without(args: Args, opened: Checkpoint, module: Module, base: TensorRTBase, digest: str) -> Recipe:
    """Weights come when an engine runs: names, shapes and types are all that a network needs."""
    from ..backends.tensorrt import run, skeleton
    from ..precision.fit import all_layers, check_fit
    from ..precision.plan import preset
    from ..runtime import precision as precisions

    names = all_layers(skeleton.outline(opened.model, base=base))
    resolved = precisions.resolve(args.precision, opened)
    plan, parts = resolved.plan, "bfloat16" if resolved.dtype == "float32" else resolved.dtype
    _refuse_scales(plan)
    if plan is not None:
        check_fit(plan, names, checkpoint_hash=digest)
    chosen = plan or preset("bf16")
    outlined = skeleton.outline(opened.model, base=base, formats=chosen.formats(names), precision=parts)
    return run.Recipe(module, outlined, {}, chosen, baked=False, fused=args.tensorrt.fused)


def _refuse_scales(plan: PrecisionPlan | None) -> None:
    kinds = {rule.input_scale for rule in plan.rules} - {"tensor"} if plan is not None else set()
    if plan is not None and kinds:
        raise Unsupported(
            "engines hold one static input scale per tensor", got=f"{plan.name} with {', '.join(sorted(kinds))}",
            do="calibrate with --input-scale tensor",
        )  # fmt: skip


def _base(args: Args, dtype: str, wanted: Sequence[Target]) -> TensorRTBase:
    from ..backends.tensorrt.targets import choose_base, here

    oldest = min(target.number for target in wanted or [here()])
    return choose_base(args.tensorrt.base, oldest, float32=dtype == "float32")


def _networks(args: Args, opened: Checkpoint, *, baked: bool) -> Iterator[tuple[Part, Shapes]]:
    """Every (part, shapes) that the backend will ask for, one request at a time; the longest prompt last."""
    from ..backends.tensorrt.networks import PARTS, Shapes
    from ..backends.tensorrt.run import prompt_bucket

    parts = _chosen_parts(args.parts)
    views, longest = _sizes(args, opened)
    lengths = _chosen_prompts(args.prompts) or range(1, longest + 1)
    size = prompt_bucket(baked)
    buckets = sorted({-(-length // size) * size for length in lengths})
    steps = opened.num_denoise_steps or 10
    for part in PARTS:
        if part == "vision" and part in parts:
            yield part, Shapes(batch=views)
        elif part in parts:
            for bucket in buckets:
                keys = views * opened.model.vision.tokens + bucket
                yield part, Shapes(keys=keys, steps=steps if part == "loop" else 0)


def _chosen_parts(text: str) -> list[str]:
    from ..backends.tensorrt.networks import PARTS

    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ConfigError(
            "unknown part of a policy", got=", ".join(unknown) or repr(text), wanted=f"some of {', '.join(PARTS)}"
        )
    return parts


def _chosen_prompts(text: str) -> list[int]:
    """Prompt lengths; "" = []."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError("prompt lengths are numbers from 1", got=repr(text), wanted="for instance 64,128")
    return [int(part) for part in parts]


def _sizes(args: Args, opened: Checkpoint) -> tuple[int, int]:
    """(views, longest prompt) of this robot."""
    if args.views is not None and args.prompts:
        return args.views, 0
    io = _robot(args, opened)
    return args.views if args.views is not None else len(io.embodiment.cameras), io.max_prompt_tokens


def _robot(args: Args, opened: Checkpoint) -> RobotIO:
    from ..robots.io import resolve

    try:
        return resolve(
            opened.robot, opened.model.kind, embodiment=args.checkpoint.embodiment, asset_id=args.checkpoint.asset_id,
            image_size=opened.model.vision.image_size, action_width=opened.model.action_width,
            max_prompt_tokens=args.checkpoint.max_prompt_tokens, vocab_size=opened.model.vocab_size,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(
            "the sizes of this robot's observations are not known", got=str(error),
            do="pass --views and --prompts, or --embodiment",
        ) from error  # fmt: skip
