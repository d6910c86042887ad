"""Replays fixtures that the original software wrote: raw observation in, every stage compared, robot actions out.

A policy fixture is a checkpoint folder, an observation, the noise, and what openpi or LeRobot computed from them, stage by
stage. A stage passes when it is within the fixture's own tolerance and, in float32, within 1e-5 of the originals (JAX:
1e-4) relative to the stage's scale. A stage that the fixture stores and this replay does not know is a failure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from ..config import EngineConfig
from ..errors import ConfigError, VivaceError
from ..model.flow import prefix_weights
from ..robots.embodiment import embodiment
from ..runtime.policy import Policy, load_policy
from ..types import ActionChunk, Embodiment, PreviousChunk, Trace
from .golden_tables import replay_tables
from .golden_wire import replay_wire
from .rows import Row

FLOAT32_LIMIT, JAX_LIMIT, BFLOAT16_LIMIT = 1e-5, 1e-4, 5e-3
# What a damaged fixture or checkpoint raises below us: its case fails, and the other cases go on.
BROKEN = (
    VivaceError,
    SafetensorError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OSError,
    RuntimeError,
)
EXACT_STAGES = ("tokens", "token_mask", "images_u8")


@dataclass(frozen=True)
class Replay:
    """What one replayed request produced."""

    case: Mapping[str, Any]
    policy: Policy
    chunk: ActionChunk
    trace: Trace


def replay(folder: Path) -> tuple[list[Row], float]:
    """Replay one fixture folder of any kind; returns its rows and how many seconds it took."""
    start = time.perf_counter()
    try:
        case = _read_case(folder)
    except ConfigError as error:
        return [Row(folder.name, "case.json", float("inf"), 0.0, False, str(error))], 0.0
    by_kind: dict[str, Callable[[Path], list[Row]]] = {
        "policy": replay_policy, "prompts": replay_tables, "transforms": replay_tables,
        "tokenizer": replay_tables, "websocket": replay_wire,
    }  # fmt: skip
    kind = str(case.get("kind"))
    if kind not in by_kind:
        wanted = ", ".join(sorted(by_kind))
        return [Row(folder.name, "kind", 1.0, 0.0, False, f"unknown kind {kind!r}, wanted one of {wanted}")], 0.0
    try:
        rows = by_kind[kind](folder)
    except BROKEN as error:
        rows = [Row(folder.name, "replay", float("inf"), 0.0, False, f"{type(error).__name__}: {error}")]
    if not rows:
        rows = [Row(folder.name, "replay", 1.0, 0.0, False, "the folder holds nothing to compare")]
    return rows, time.perf_counter() - start


def folders(root: Path) -> list[Path]:
    """All fixture folders: `root` itself if it is one, else its children that hold a case.json."""
    if (root / "case.json").is_file():
        return [root]
    found = sorted(path.parent for path in root.glob("*/case.json"))
    if not found:
        raise ConfigError("no fixtures here", got=str(root), wanted="folders with a case.json")
    return found


def replay_policy(folder: Path, backend: str = "eager") -> list[Row]:
    """Replay one policy fixture on the CPU; also its `bf16_serving.*` stages where it has them."""
    case, expected = _read_case(folder), load_file(folder / "expected.safetensors")
    got = run(folder, case, precision=str(case["dtype"]), backend=backend)
    rows = [
        row
        for stage, wanted in expected.items()
        if not stage.startswith("bf16_serving.")
        for row in _compare(case, stage, _stage(got, stage), wanted)
    ]
    serving = {stage: wanted for stage, wanted in expected.items() if stage.startswith("bf16_serving.")}
    if serving:
        low = run(folder, case, precision="bfloat16", backend=backend)
        rows += [
            _compare_serving(case, stage, _stage(low, stage.partition(".")[2]), wanted)
            for stage, wanted in serving.items()
        ]
    return rows


def run(folder: Path, case: Mapping[str, Any], *, precision: str, backend: str) -> Replay:
    """Load the fixture's checkpoint and answer its request."""
    inputs = load_file(folder / "inputs.safetensors")
    policy = load_policy(
        folder / "checkpoint",
        embodiment=_embodiment(case),
        asset_id=(case.get("embodiment") or {}).get("asset_id"),
        tokenizer=(folder / case["tokenizer"]).resolve() if case.get("tokenizer") else None,
        horizon=case["horizon"],
        vision_heads=case.get("not_inferable", {}).get("vision_heads"),
        max_prompt_tokens=case.get("max_token_len"),
        lerobot_version="0.4" if case.get("pad_state_before_discretise") else "auto",
        config=EngineConfig(
            backend=backend, device="cpu", precision=precision, num_denoise_steps=case.get("num_steps"), seed=0
        ),
    )
    trace = Trace()
    previous = _previous(case, inputs, policy)
    chunk = policy.infer(_request(case, inputs), noise=inputs["noise"], previous=previous, trace=trace)
    return Replay(case, policy, chunk, trace)


def _read_case(folder: Path) -> dict[str, Any]:
    try:
        case: Any = json.loads((folder / "case.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the fixture", got=f"{folder}: {error}", wanted="a folder with case.json"
        ) from error
    if not isinstance(case, dict):
        raise ConfigError("case.json is not an object", got=type(case).__name__, wanted="{...}")
    return {"name": folder.name, "tolerances": {}, **case}


def _embodiment(case: Mapping[str, Any]) -> Embodiment | None:
    """openpi fixtures name their robot and how its config deviates; LeRobot's, and silent ones, leave it to the folder."""
    told = case.get("embodiment")
    if not told:
        return None
    in_prompt = bool(case.get("discrete_state_input", True))
    robot = replace(embodiment(told["name"], case["model"]), state_in_prompt=in_prompt)
    if told.get("delta_mask") is not None:
        robot = replace(robot, delta_mask=tuple(told["delta_mask"]))
    if (dims := told.get("output_dims")) is not None and dims != robot.action_dim:
        units = robot.action_units[:dims] if dims < robot.action_dim else ()
        robot = replace(robot, action_dim=dims, action_units=units)
    if told.get("adapt_to_pi") is False:
        robot = replace(robot, joint_signs=(), gripper_adapter="none")
    return robot


def _request(case: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The request as a client sends it: openpi nests "obs:images/cam", LeRobot names features."""
    request: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith("obs:"):
            key = name.removeprefix("obs:")
            outer, _, inner = key.partition("/")
            if outer == "images" and inner:
                request.setdefault(outer, {})[inner] = value
            else:
                request[key] = value
        elif name.startswith("images."):
            request[f"observation.{name}"] = value
        elif name == "state":
            request["observation.state"] = value
    request["task" if str(case["flavour"]).startswith("lerobot") else "prompt"] = case["task"]
    return request


def _previous(case: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]], policy: Policy) -> PreviousChunk | None:
    """Real-time chunking inputs, zero-padded to [1, H, width] as LeRobot does; unnamed settings are the checkpoint's."""
    rtc, facts = case.get("rtc"), policy.checkpoint.rtc
    if not rtc:
        return None
    left = inputs["prev_chunk_left_over"]
    actions = torch.zeros(1, policy.engine.horizon, policy.io.action_width)
    actions[0, : left.shape[0], : left.shape[1]] = torch.from_numpy(left)
    delay = int(rtc["inference_delay"])
    if rtc["mode"] == "trained":
        return PreviousChunk(actions, delay, "trained")
    end = (
        rtc.get("execution_horizon")
        or rtc.get("config_execution_horizon")
        or (facts.execution_horizon if facts else 10)
    )
    schedule = rtc.get("schedule") or (facts.schedule if facts else "LINEAR")
    limit = rtc.get("max_guidance_weight") or (facts.max_guidance if facts else 10.0)
    weights = prefix_weights(
        str(schedule).lower(),  # type: ignore[arg-type]
        delay=delay,
        end=min(int(end), left.shape[0]),
        horizon=policy.engine.horizon,
    )
    return PreviousChunk(actions, delay, "guided", weights, float(limit))


def _stage(got: Replay, stage: str) -> NDArray[Any] | None:
    """Our value of a stored stage, in its stored form; None = unknown stage."""
    name, _, index = stage.partition(".")
    views: dict[str, Callable[[int], NDArray[Any]]] = {
        "images_u8": lambda i: np.moveaxis(_images(got)[i], 0, -1),
        "images": lambda i: _unit_range(_images(got)[i])[:, ::2, ::2],
        "images_mean": lambda i: _unit_range(_images(got)[i]).astype(np.float64).mean(axis=(1, 2)),
        "vision_tokens": lambda i: _vision_tokens(got, i),
    }
    if name in views and index.isdigit():
        return views[name](int(index))
    whole: dict[str, Callable[[Replay], NDArray[Any]]] = {
        "tokens": lambda g: _padded_tokens(g)[0],
        "token_mask": lambda g: _padded_tokens(g)[1],
        "state_normalized": lambda g: _prepared(g).state_normalized,
        "prefix_embeds": lambda g: _array(g.trace.prefix_embeds)[0],
        "prefix_k": lambda g: _cache(g, "k"),
        "prefix_v": lambda g: _cache(g, "v"),
        "velocity": lambda g: np.stack([_array(v)[0] for v in g.trace.velocity]),
        "velocity_guided": lambda g: np.stack([_array(v)[0] for v in g.trace.velocity_used]),
        "x": lambda g: np.stack([_array(x)[0] for x in g.trace.x]),
        "actions_normalized": lambda g: g.chunk.actions_normalized,
        "actions": lambda g: g.chunk.actions,
    }
    return whole[stage](got) if stage in whole else None


def _array(tensor: Tensor | None) -> NDArray[Any]:
    assert tensor is not None, "the backend left the trace empty"
    return tensor.float().cpu().numpy()


def _prepared(got: Replay) -> Any:
    assert got.trace.prepared is not None, "the policy left the trace empty"
    return got.trace.prepared


def _images(got: Replay) -> NDArray[Any]:
    images: NDArray[Any] = _prepared(got).images
    return images


def _unit_range(image: NDArray[Any]) -> NDArray[np.float32]:
    if image.dtype != np.uint8:
        return image.astype(np.float32)
    return image.astype(np.float32) / np.float32(255.0) * np.float32(2.0) - np.float32(1.0)


def _vision_tokens(got: Replay, view: int) -> NDArray[Any]:
    per_view = got.policy.model.config.vision.tokens
    return _array(got.trace.vision_tokens)[0, view * per_view : (view + 1) * per_view]


def _padded_tokens(got: Replay) -> tuple[NDArray[Any], NDArray[Any]]:
    tokens, width = _prepared(got).tokens, got.policy.io.max_prompt_tokens
    padded = np.zeros(width, dtype=np.int64)
    padded[: len(tokens)] = tokens
    return padded, np.arange(width) < len(tokens)


def _cache(got: Replay, which: str) -> NDArray[Any]:
    cache = got.trace.cache
    assert cache is not None, "the policy left the trace empty"
    tensors = cache.k if which == "k" else cache.v
    S = _array(got.trace.prefix_embeds).shape[1]
    layers = got.case.get("prefix_kv_layers", range(len(tensors)))
    return np.stack([_array(tensors[layer])[0, :S, 0] for layer in layers])


def _compare(case: Mapping[str, Any], stage: str, got: NDArray[Any] | None, wanted: NDArray[Any]) -> list[Row]:
    """One row per bound that applies to this stage."""
    name = str(case["name"])
    if got is None:
        return [Row(name, stage, float("inf"), 0.0, False, "stage not known to this replay")]
    if got.shape != wanted.shape:
        return [Row(name, stage, float("inf"), 0.0, False, f"shape {got.shape}, wanted {wanted.shape}")]
    if stage.partition(".")[0] in EXACT_STAGES:
        differing = float(np.count_nonzero(got != wanted))
        return [Row(name, stage, differing, 0.0, differing == 0, "values that differ")]
    difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    if stage == "state_normalized":
        difference = difference / np.maximum(1.0, np.abs(wanted))
    bounds = case["tolerances"]
    rows = []
    if stage in bounds:
        rows.append(_row(name, stage, float(difference.max()), float(bounds[stage]), "max abs"))
    if f"{stage}_rel_l2" in bounds:
        rows.append(_row(name, stage, _rel_l2(got, wanted), float(bounds[f"{stage}_rel_l2"]), "relative L2"))
    if case["dtype"] == "float32":
        limit = JAX_LIMIT if case["flavour"] == "openpi_jax" else FLOAT32_LIMIT
        rows.append(_row(name, stage, _relative(difference, wanted), limit, "max abs / scale"))
    elif stage in ("x", "actions_normalized", "actions"):
        rows.append(_row(name, stage, _rel_l2(got, wanted), BFLOAT16_LIMIT, "relative L2"))
    return rows or [Row(name, stage, float(difference.max()), 0.0, False, "the fixture states no tolerance")]


def _compare_serving(case: Mapping[str, Any], stage: str, got: NDArray[Any] | None, wanted: NDArray[Any]) -> Row:
    """JAX as openpi serves it, all parameters bfloat16: near, but not our rounding order."""
    if got is None or got.shape != wanted.shape:
        return Row(str(case["name"]), stage, float("inf"), 0.0, False, "stage missing or of another shape")
    bound = float(case["tolerances"].get("bf16_serving.actions_normalized_rel_l2", 0.02))
    return _row(str(case["name"]), stage, _rel_l2(got, wanted), bound, "relative L2")


def _row(case: str, stage: str, error: float, tolerance: float, note: str) -> Row:
    return Row(case, stage, error, tolerance, bool(error <= tolerance), note)


def _relative(difference: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(difference.max() / max(float(np.abs(wanted).max()), 1e-30))


def _rel_l2(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    wide = wanted.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - wide) / max(float(np.linalg.norm(wide)), 1e-30))
