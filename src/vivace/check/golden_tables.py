"""Replays the fixture folders that hold tables and no model: prompts, transforms, tokenizer. One row per record and output.

Every record is replayed through the functions that a policy uses; a record that cannot be (an unknown operation, a missing
tensor, an error on the way) is a failed row, never a skipped one. The folder's `case.json` says which table it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ..errors import ConfigError, VivaceError
from ..robots import aloha
from ..robots.actions import relative_mask, to_absolute, to_delta
from ..robots.embodiment import embodiment
from ..robots.images import resize_jax, resize_pil, resize_torch, to_hwc, to_uint8
from ..robots.normalize import normalize_lerobot, normalize_openpi, unnormalize_lerobot, unnormalize_openpi
from ..robots.pipeline import adapt_actions, adapt_state
from ..robots.prompt import LEROBOT04_STATE_WIDTH, Segment, discretise, segments
from ..robots.request import pictures_of, words_of
from ..robots.tokenizer import SentencePieceModel, Tokenizer, TokenizerJson
from ..types import Embodiment, NormMode, NormStats, PromptFlavour
from .rows import Row

__all__ = ["Row", "replay_tables"]

BROKEN = (VivaceError, KeyError, ValueError, TypeError, IndexError, OSError)
"""What a malformed record or fixture raises; it becomes a failed row that says so."""


def replay_tables(folder: Path) -> list[Row]:
    """Replay one fixture folder of kind "prompts", "transforms" or "tokenizer".

    Raises: ConfigError if the folder has no readable case.json or is of another kind.
    """
    try:
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        name, kind = str(case.get("name", folder.name)), case["kind"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{folder} is not a fixture folder", got=repr(error), wanted="a case.json with a kind"
        ) from error
    if kind not in REPLAYS:
        raise ConfigError(f"{folder} is not a table", got=f"kind {kind!r}", wanted=f"one of {sorted(REPLAYS)}")
    try:
        rows = REPLAYS[kind](folder, name, case)
    except BROKEN as error:
        return [_broken(name, kind, error)]
    return rows or [Row(name, kind, 1.0, 0.0, False, "the table is empty")]


def _broken(case: str, stage: str, error: Exception) -> Row:
    return Row(case, stage, 1.0, 0.0, False, f"{type(error).__name__}: {error}")


def _exact(case: str, stage: str, got: Any, wanted: Any) -> Row:
    same = bool(got == wanted)
    return Row(case, stage, 0.0 if same else 1.0, 0.0, same, "" if same else f"got {got!r}, wanted {wanted!r}"[:300])


# --- prompts ------------------------------------------------------------------------------------------------------

OPENPI_PROMPTS: dict[str, tuple[PromptFlavour, bool]] = {
    "openpi_pi0": ("openpi_pi0", True),
    "openpi_pi05": ("openpi_pi05", True),
    "openpi_pi05_libero": ("openpi_pi05", False),
}
LEROBOT_PROMPTS: dict[str, tuple[PromptFlavour, int]] = {
    "lerobot_pi0": ("lerobot_pi0", 0),
    "lerobot_pi05": ("lerobot_pi05", 0),
    "lerobot04_pi05": ("lerobot04_pi05", LEROBOT04_STATE_WIDTH),
}


def _prompts(folder: Path, name: str, case: Mapping[str, Any]) -> list[Row]:
    table = json.loads((folder / case["file"]).read_text(encoding="utf-8"))
    rows = []
    for record in table["rows"]:
        state = np.asarray(record["state"], dtype=np.float64)
        for column in record:
            if column not in ("id", "task", "state"):
                stage = f"{record.get('id')} {column}"
                try:
                    got = _prompt_column(column, str(record["task"]), state)
                    rows.append(_exact(name, stage, got, record[column]))
                except BROKEN as error:
                    rows.append(_broken(name, stage, error))
    return rows


def _prompt_column(column: str, task: str, state: NDArray[np.float64]) -> Any:
    if column == "bins_float64":
        return discretise(state)
    if column == "bins_float32":
        return discretise(state.astype(np.float32))
    if column in OPENPI_PROMPTS:
        flavour, in_prompt = OPENPI_PROMPTS[column]
        parts = segments(flavour, task, state, state_in_prompt=in_prompt)
        return [{"text": part.text, "add_bos": part.add_bos} for part in parts]
    if column in LEROBOT_PROMPTS:
        flavour, width = LEROBOT_PROMPTS[column]
        return "".join(part.text for part in segments(flavour, task, state, pad_state_to=width))
    raise KeyError(f"unknown column {column!r}")


# --- tokenizer ----------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, name: str, case: Mapping[str, Any]) -> list[Row]:
    files = [folder / file for file in case["files"]]
    model = SentencePieceModel(next(file for file in files if file.suffix == ".model"))
    hub = TokenizerJson(next(file for file in files if file.name == "tokenizer.json"))
    table = json.loads(next(file for file in files if file.name == "samples.json").read_text(encoding="utf-8"))
    rows = [_exact(name, key, _vocabulary(model, key), table[key]) for key in table if key not in ("note", "samples")]
    for i, sample in enumerate(table["samples"]):
        for column in sample:
            if column != "text":
                try:
                    got = _token_column(column, str(sample["text"]), model, hub)
                    rows.append(_exact(name, f"{i} {column}", got, sample[column]))
                except BROKEN as error:
                    rows.append(_broken(name, f"{i} {column}", error))
    return rows


def _vocabulary(model: SentencePieceModel, key: str) -> Any:
    processor = model.processor
    facts: dict[str, Any] = {
        "vocab_size": processor.GetPieceSize(),
        "special": {part: getattr(processor, f"{part}_id")() for part in ("pad", "eos", "bos", "unk")},
        "newline_id": processor.PieceToId("\n"),
        "space_id": processor.PieceToId("\u2581"),
        "digit_ids": [processor.PieceToId(digit) for digit in "0123456789"],
        "minus_id": processor.PieceToId("-"),
    }
    return facts.get(key, f"unknown fact {key!r}")


def _token_column(column: str, text: str, model: SentencePieceModel, hub: Tokenizer) -> Any:
    nothing = np.zeros(0)
    if column == "sentencepiece_with_bos":
        return model.encode(text, add_bos=True)
    if column == "huggingface":
        return hub.encode(text, add_bos=True)
    if column == "same":
        return model.encode(text, add_bos=True) == hub.encode(text, add_bos=True)
    if column == "pieces":
        return model.pieces(model.encode(text, add_bos=True))
    if column == "openpi_pi0_ids":
        return _ids(segments("openpi_pi0", text, nothing), model)
    if column == "lerobot_pi0_ids":
        return _ids(segments("lerobot_pi0", text, nothing), hub)
    raise KeyError(f"unknown column {column!r}")


def _ids(parts: tuple[Segment, ...], tokenizer: Tokenizer) -> list[int]:
    return [token for part in parts for token in tokenizer.encode(part.text, add_bos=part.add_bos)]


# --- transforms ---------------------------------------------------------------------------------------------------

Values = Mapping[str, Any]


def _transforms(folder: Path, name: str, case: Mapping[str, Any]) -> list[Row]:
    rows = []
    for table_name, tensors_name in case["files"]:
        records = json.loads((folder / table_name).read_text(encoding="utf-8"))["records"]
        tensors = load_file(folder / tensors_name)
        for record in records:
            stage = f"{table_name} {record.get('id')} {record.get('op')}"
            try:
                rows += _replay_record(name, stage, record, tensors)
            except BROKEN as error:
                rows.append(_broken(name, stage, error))
    return rows


def _replay_record(case: str, stage: str, record: Values, tensors: Mapping[str, NDArray[Any]]) -> list[Row]:
    if record["op"] not in OPERATIONS:
        raise KeyError(f"unknown operation {record['op']!r}")
    params = record.get("params", {})
    inputs = {key: _load(value, tensors) for key, value in record["inputs"].items()}
    wanted = {key: _load(value, tensors) for key, value in record["outputs"].items()}
    got = dict(OPERATIONS[record["op"]](params, inputs))
    if record["op"].endswith("_inputs"):
        _add_masked_views(got, wanted)
    rows = [_compare(case, f"{stage} {key}", got.get(key), wanted[key], record) for key in wanted]
    return rows + [_broken(case, f"{stage} {key}", KeyError("not expected")) for key in got if key not in wanted]


def _load(value: Any, tensors: Mapping[str, NDArray[Any]]) -> Any:
    return tensors[value["tensor"]] if isinstance(value, dict) and "tensor" in value else value


def _add_masked_views(got: dict[str, Any], wanted: Values) -> None:
    """The originals send zeros and a False mask for a missing camera; vivace leaves the view out, which is the same."""
    for key in wanted:
        if key.startswith("image/") and key not in got:
            got[key] = np.zeros_like(got["image/base_0_rgb"])
            got[key.replace("image/", "image_mask/", 1)] = False


def _compare(case: str, stage: str, got: Any, wanted: Any, record: Values) -> Row:
    if not isinstance(wanted, np.ndarray):
        return _exact(case, stage, got, wanted)
    stride = int(record.get("params", {}).get("stored_stride", 1))
    if isinstance(got, np.ndarray) and stride != 1:
        got = got[::stride, ::stride]
    if not isinstance(got, np.ndarray) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, np.ndarray) else repr(got)
        return Row(case, stage, 1.0, 0.0, False, f"got {shown}, wanted {wanted.dtype} {list(wanted.shape)}")
    difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    if not record["op"].startswith("resize"):
        difference = difference / np.maximum(1.0, np.abs(wanted.astype(np.float64)))
    error = float(difference.max(initial=0.0))
    tolerance = _tolerance(record["op"], wanted.dtype)
    # `not >` would let NaN pass
    return Row(case, stage, error, tolerance, bool(error <= tolerance), f"{wanted.dtype}")


def _tolerance(op: str, dtype: np.dtype[Any]) -> float:
    """As the fixtures' notes state: float resizes 2e-6, uint8 exact (JAX's: 1), float64 1e-12, float32 1e-6 relative."""
    if dtype.kind != "f":
        return 1.0 if op == "resize_with_pad_jax_openpi_uint8" else 0.0
    if op.startswith("resize"):
        return 2e-6
    return 1e-12 if dtype == np.float64 else 1e-6


def _scaled(image: NDArray[np.uint8], low: float, high: float) -> NDArray[np.float32]:
    """uint8 [h, w, 3] to float32 [3, h, w] in [low, high], as the record's `input` describes."""
    unit = np.moveaxis(image, -1, 0).astype(np.float32) / np.float32(255)
    return unit * np.float32(high - low) + np.float32(low)


def _resize_pil(params: Values, inputs: Values) -> Values:
    return {"image": resize_pil(inputs["image"], height=params["height"], width=params["width"])}


def _resize_torch(low: float, high: float) -> Callable[[Values, Values], Values]:
    """low, high: the range that the caller of this flavour maps pixels to first; `value_range` is what it clamps to."""

    def replay(params: Values, inputs: Values) -> Values:
        clamp_low, clamp_high = params["value_range"]
        out = resize_torch(
            _scaled(inputs["image"], low, high),
            height=params["height"],
            width=params["width"],
            pad=params["pad"],
            low=clamp_low,
            high=clamp_high,
        )
        return {"image": np.moveaxis(out, 0, -1)}

    return replay


def _resize_jax(params: Values, inputs: Values) -> Values:
    if params.get("antialias") is not True:
        raise ValueError("only the anti-aliased JAX resize exists in openpi")
    low, high = params.get("value_range", (0, 255))
    pixels = _scaled(inputs["image"], low, high) if "value_range" in params else np.moveaxis(inputs["image"], -1, 0)
    out = resize_jax(pixels, height=params["height"], width=params["width"], pad=params["pad"], low=low, high=high)
    return {"image": np.moveaxis(out, 0, -1)}


MODES: dict[str, NormMode] = {
    "z-score": "mean_std",
    "quantile": "quantiles",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantile10",
    "IDENTITY": "identity",
}


def _normalize(params: Values, inputs: Values) -> Values:
    return {"y": _scale(params, inputs, {"openpi": normalize_openpi, "lerobot": normalize_lerobot})}


def _unnormalize(params: Values, inputs: Values) -> Values:
    return {"y": _scale(params, inputs, {"openpi": unnormalize_openpi, "lerobot": unnormalize_lerobot})}


def _scale(params: Values, inputs: Values, functions: Mapping[str, Callable[..., NDArray[Any]]]) -> NDArray[Any]:
    known = {key: value for key, value in inputs.items() if key != "x" and value is not None}
    stats = NormStats(**{key: value.astype(np.float64) for key, value in known.items()})
    return functions[params["flavour"]](inputs["x"], stats, mode=MODES[params["mode"]], eps=params["eps"])


def _delta(params: Values, inputs: Values) -> Values:
    return {"actions": to_delta(inputs["actions"], inputs["state"], mask=params["mask"])}


def _absolute(params: Values, inputs: Values) -> Values:
    return {"actions": to_absolute(inputs["actions"], inputs["state"], mask=params["mask"])}


def _relative(params: Values, inputs: Values) -> Values:
    actions, state = inputs["actions"], inputs["state"]
    mask = relative_mask(params["action_names"], params["exclude_joints"], dims=actions.shape[-1])
    if list(mask) != params["mask"]:
        raise ValueError(f"mask {list(mask)}, wanted {params['mask']}")
    return {"relative": to_delta(actions, state, mask=mask), "absolute": to_absolute(actions, state, mask=mask)}


def _robot(name: str, params: Values) -> Embodiment:
    """A known robot as the record was made with: `adapt_to_pi` False takes ALOHA's signs and gripper away."""
    robot = embodiment(name, params.get("model_type", "pi0"))
    if params.get("adapt_to_pi") is False:
        return replace(robot, joint_signs=(), gripper_dims=(), gripper_adapter="none")
    return robot


def _inputs(name: str) -> Callable[[Values, Values], Values]:
    def replay(params: Values, inputs: Values) -> Values:
        if params.get("model_type", "pi0") not in ("pi0", "pi05"):
            raise ValueError(f"model_type {params['model_type']!r} is not a flow policy")
        request = dict(inputs)
        if params.get("prompt_as_bytes"):
            request["prompt"] = request["prompt"].encode("utf-8")
        robot = _robot(name, params)
        pictures, words = pictures_of(request, robot), words_of(request, robot, dtype=np.float64)
        out: dict[str, Any] = {"prompt": words.prompt}
        out["state"] = None if words.state is None else adapt_state(words.state, robot)
        for view, image in pictures:
            out |= {f"image/{view}": to_hwc(to_uint8(image)), f"image_mask/{view}": True}
        return out

    return replay


def _outputs(name: str) -> Callable[[Values, Values], Values]:
    def replay(params: Values, inputs: Values) -> Values:
        robot = _robot(name, params)
        return {"actions": adapt_actions(inputs["actions"][..., : robot.action_dim], robot)}

    return replay


def _pad(params: Values, inputs: Values) -> Values:
    x = inputs["x"]
    return {"y": np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, params["dim"] - x.shape[-1]))])}


OPERATIONS: dict[str, Callable[[Values, Values], Values]] = {
    "resize_with_pad_pil": _resize_pil,
    "resize_with_pad_torch_openpi": _resize_torch(-1.0, 1.0),
    "resize_with_pad_torch_lerobot": _resize_torch(0.0, 1.0),
    "resize_with_pad_jax_openpi": _resize_jax,
    "resize_with_pad_jax_openpi_uint8": _resize_jax,
    "normalize": _normalize,
    "unnormalize": _unnormalize,
    "delta_actions": _delta,
    "absolute_actions": _absolute,
    "relative_actions": _relative,
    "aloha_gripper_to_angular": lambda params, inputs: {"y": aloha.gripper_to_angle(inputs["x"])},
    "aloha_gripper_from_angular": lambda params, inputs: {"y": aloha.gripper_from_angle(inputs["x"])},
    **{f"{robot}_inputs": _inputs(robot) for robot in ("libero", "droid", "aloha")},
    **{f"{robot}_outputs": _outputs(robot) for robot in ("libero", "droid", "aloha")},
    "pad_to_dim": _pad,
}
REPLAYS: dict[str, Callable[[Path, str, Mapping[str, Any]], list[Row]]] = {
    "prompts": _prompts,
    "transforms": _transforms,
    "tokenizer": _tokenizer,
}
