"""LeRobot's processor files: how a robot's images, state and text become model inputs, as a list of named steps.

`policy_preprocessor.json` and `policy_postprocessor.json` hold `{"steps": [{registry_name, config, state_file?}]}`. Step
numbers differ between versions and policies, so the statistics are found by `state_file`, never by a number. A step that
vivace does not know could change what the policy sees, so it is refused, not skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..types import NormMode, NormStats, PolicyKind, PromptFlavour, RobotFacts
from .folder import as_flag, as_strings, as_table, read_json, tokenizer_dir, whole
from .safetensors_io import read_header, read_tensor
from .settings import LeRobotVersion, positive

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
RELATIVE_STEPS = ("relative_actions_processor", "delta_actions_processor")  # 0.5.1 called it delta
KNOWN_STEPS = frozenset(
    {
        "rename_observations_processor",
        "to_batch_processor",
        "pi0_new_line_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
        "normalizer_processor",
        "unnormalizer_processor",
        "absolute_actions_processor",
        *RELATIVE_STEPS,
    }
)
CLASSES = {  # steps may be named by class instead
    "RenameObservationsProcessorStep": "rename_observations_processor",
    "AddBatchDimensionProcessorStep": "to_batch_processor",
    "Pi0NewLineProcessor": "pi0_new_line_processor",
    "Pi05PrepareStateTokenizerProcessorStep": "pi05_prepare_state_tokenizer_processor_step",
    "TokenizerProcessorStep": "tokenizer_processor",
    "DeviceProcessorStep": "device_processor",
    "NormalizerProcessorStep": "normalizer_processor",
    "UnnormalizerProcessorStep": "unnormalizer_processor",
    "AbsoluteActionsProcessorStep": "absolute_actions_processor",
    "RelativeActionsProcessorStep": "relative_actions_processor",
    "DeltaActionsProcessorStep": "delta_actions_processor",
}
MODES: dict[str, NormMode] = {
    "IDENTITY": "identity",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantile10",
}
DEFAULT_MODES: dict[PolicyKind, str] = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}
STATE, ACTION, EMPTY_CAMERA = "observation.state", "action", "observation.images.empty_camera_"
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}


@dataclass(frozen=True)
class Step:
    """One processor step: its registry name, its settings, and the file of its tensors."""

    name: str
    config: Mapping[str, Any]
    state_file: Path | None


@dataclass(frozen=True)
class Processors:
    """The two pipelines; empty where the folder lacks the file."""

    pre: tuple[Step, ...]
    post: tuple[Step, ...]


def read_processors(folder: Path) -> Processors:
    """Read both pipeline files. Raises CheckpointError for a step that vivace does not know."""
    return Processors(_steps(folder / PRE), _steps(folder / POST))


def robot_facts(
    folder: Path, config: Mapping[str, Any], processors: Processors, *, kind: PolicyKind, version: LeRobotVersion
) -> RobotFacts:
    """Collect what the folder says about its robot."""
    file = folder / "config.json"
    inputs, outputs = _features(config, "input_features", file), _features(config, "output_features", file)
    normalizer = _find(processors.pre, "normalizer_processor")
    unnormalizer = _find(processors.post, "unnormalizer_processor")
    tokenizer = _find(processors.pre, "tokenizer_processor")
    rename = _find(processors.pre, "rename_observations_processor")
    _check_pictures_unscaled(normalizer, config)
    cameras = [name for name, feature in inputs.items() if feature["type"] == "VISUAL"]
    action_dim = _size(outputs, ACTION, file)
    stats, notes = _statistics(folder, normalizer, unnormalizer)
    empty = [name for name in cameras if name.startswith(EMPTY_CAMERA)]
    if empty:
        notes.append(f"{len(empty)} empty camera slots are left out; they were always masked")
    old, flavour = version == "0.4", _prompt_flavour(kind, version)
    return RobotFacts(
        source="lerobot",
        stats=stats,
        state_mode=_mode(normalizer, config, "STATE", kind),
        action_mode=_mode(unnormalizer or normalizer, config, "ACTION", kind),
        eps=positive(normalizer.config if normalizer else {}, "eps", 1e-8, where=folder / PRE),
        prompt=flavour,
        image_pad=-1.0 if old else 0.0,
        pad_state_to=(whole(config, "max_state_dim", where=file) or 32) if old and kind == "pi05" else 0,
        cameras=tuple(name for name in cameras if name not in empty),
        state_dim=_size(inputs, STATE, file),
        action_dim=action_dim,
        relative_mask=_relative_mask(processors, config, action_dim, notes),
        rename=_rename(rename),
        max_prompt_tokens=_max_tokens(tokenizer, config, file) or PROMPT_TOKENS[kind],
        tokenizer_dir=tokenizer_dir(folder),
        notes=tuple(notes),
    )


def _steps(file: Path) -> tuple[Step, ...]:
    if not file.is_file():
        return ()
    entries = read_json(file).get("steps")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{file} has no list of steps", do="the file is damaged; copy it again")
    steps = []
    for entry in entries:
        by_class = str(entry.get("class"))
        name = str(entry.get("registry_name") or CLASSES.get(by_class.rsplit(".", 1)[-1], by_class))
        settings = entry.get("config") or {}
        if name not in KNOWN_STEPS or not isinstance(settings, dict):
            raise CheckpointError(
                f"{file} has a processor step that vivace does not know",
                got=name,
                wanted=f"one of {sorted(KNOWN_STEPS)}",
                do="it could change what the policy sees; remove it from the file if it does not",
            )
        state = entry.get("state_file")
        if state is not None and (not isinstance(state, str) or Path(state).name != state):
            raise CheckpointError(f"{file} points outside its folder", got=repr(state)[:80])
        steps.append(Step(name, settings, file.parent / state if state else None))
    return tuple(steps)


def _find(steps: tuple[Step, ...], name: str) -> Step | None:
    return next((step for step in steps if step.name == name), None)


def _features(config: Mapping[str, Any], key: str, file: Path) -> dict[str, dict[str, Any]]:
    table = as_table(config.get(key), f"{file}: {key}")
    if not all(isinstance(v, dict) and "type" in v for v in table.values()):
        raise CheckpointError(f"{file}: {key} cannot be used", got=str(table)[:80], wanted="{name: {type, shape}}")
    return table


def _size(features: Mapping[str, dict[str, Any]], name: str, file: Path) -> int | None:
    if name not in features:
        return None
    shape = features[name].get("shape")
    if not isinstance(shape, list) or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] <= 0:
        raise CheckpointError(f"{file}: {name} cannot be used", got=f"shape {shape!r}"[:80], wanted="[size]")
    return int(shape[0])


def _prompt_flavour(kind: PolicyKind, version: LeRobotVersion) -> PromptFlavour:
    if kind == "pi0":
        return "lerobot_pi0"
    return "lerobot04_pi05" if version == "0.4" else "lerobot_pi05"


def _told_mode(step: Step | None, config: Mapping[str, Any], what: str, default: str) -> str:
    table = as_table(step.config.get("norm_map"), "norm_map") if step else {}
    table = table or as_table(config.get("normalization_mapping"), "normalization_mapping")
    return str(table.get(what, default)).rsplit(".", 1)[-1]


def _check_pictures_unscaled(step: Step | None, config: Mapping[str, Any]) -> None:
    """Pictures reach the network in [-1, 1]; scaling them by statistics would be another network's input."""
    told = _told_mode(step, config, "VISUAL", "IDENTITY")
    if told != "IDENTITY":
        raise CheckpointError(
            "normalisation of VISUAL cannot be used",
            got=repr(told),
            wanted="IDENTITY: pi0 and pi0.5 take pictures in [-1, 1]",
            do="if the policy was trained without it, set VISUAL to IDENTITY in policy_preprocessor.json and config.json",
        )


def _mode(step: Step | None, config: Mapping[str, Any], what: str, kind: PolicyKind) -> NormMode:
    told = _told_mode(step, config, what, DEFAULT_MODES[kind])
    if told not in MODES:
        raise CheckpointError(
            f"normalisation of {what} cannot be used", got=repr(told), wanted=f"one of {sorted(MODES)}"
        )
    return MODES[told]


def _statistics(
    folder: Path, normalizer: Step | None, unnormalizer: Step | None
) -> tuple[dict[str, tuple[NormStats, NormStats]], list[str]]:
    notes = []
    before, after = _state(normalizer), _state(unnormalizer)
    if not before and not after:
        notes.append("no normalisation statistics in the folder")
        return {}, notes
    state = _stats(before or after, STATE)
    action = _stats(after or before, ACTION)
    for name, stats in ((STATE, state), (ACTION, action)):
        if all(value is None for value in vars(stats).values()):
            notes.append(f"no statistics of {name}: it passes unscaled, as in LeRobot")
    return {"": (state, action)}, notes


def _state(step: Step | None) -> dict[str, torch.Tensor]:
    """The numbers of a normaliser, images left out: they are never scaled by it in this family."""
    if step is None or step.state_file is None:
        return {}
    if not step.state_file.is_file():
        raise CheckpointError(
            f"the statistics of {step.name} are missing",
            got=f"no file {step.state_file}",
            wanted="the safetensors file that the pipeline names",
            do="copy the whole folder, with the policy_*processor*.safetensors files",
        )
    stored = read_header(step.state_file).tensors
    wanted = {key: item for key, item in stored.items() if key.startswith((STATE + ".", ACTION + "."))}
    tensors = {key: read_tensor(item, torch.device("cpu")) for key, item in wanted.items()}
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{step.state_file} holds statistics that are not finite", got=", ".join(bad))
    return tensors


def _stats(tensors: Mapping[str, torch.Tensor], name: str) -> NormStats:
    fields = {}
    for key in ("mean", "std", "min", "max", "q01", "q99", "q10", "q90"):
        tensor = tensors.get(f"{name}.{key}")
        if tensor is not None and tensor.numel():
            fields[key] = tensor.reshape(-1).to(torch.float64).numpy().astype(np.float64)
    sizes = {key: array.shape[0] for key, array in fields.items()}
    if len(set(sizes.values())) > 1:
        raise CheckpointError(f"statistics of {name} differ in length", got=sizes)
    return NormStats(**fields)


def _relative_mask(
    processors: Processors, config: Mapping[str, Any], action_dim: int | None, notes: list[str]
) -> tuple[bool, ...]:
    """Per action dim: True = relative to the state. A joint is kept absolute if an excluded word is part of its name."""
    step = next((step for step in processors.pre if step.name in RELATIVE_STEPS), None)
    back = _find(processors.post, "absolute_actions_processor")
    enabled = step is not None and as_flag(step.config.get("enabled"), f"{PRE}: {step.name}.enabled")
    undone = back is not None and as_flag(back.config.get("enabled"), f"{POST}: {back.name}.enabled")
    if enabled != undone:
        raise CheckpointError(
            "the pipelines disagree about relative actions",
            got=f"enabled before: {enabled}, after: {undone}",
            wanted="both or neither",
        )
    if as_flag(config.get("use_relative_actions"), "use_relative_actions") != enabled and processors.pre:
        notes.append(
            f"config.json says use_relative_actions {config.get('use_relative_actions')}, the steps say {enabled}"
        )
    if not enabled or step is None:
        return ()
    if action_dim is None:
        raise CheckpointError("relative actions need the action's size", wanted="output_features.action in config.json")
    joints = as_strings(step.config.get("action_names") or config.get("action_feature_names"), "action_names")
    excluded = [word.lower() for word in as_strings(step.config.get("exclude_joints"), "exclude_joints")]
    if not joints:
        return (True,) * action_dim
    if len(joints) != action_dim:
        raise CheckpointError("relative actions: names do not fit", got=f"{len(joints)} names", wanted=f"{action_dim}")
    return tuple(not any(word in joint.lower() for word in excluded) for joint in joints)


def _rename(step: Step | None) -> dict[str, str]:
    table = as_table(step.config.get("rename_map"), "rename_map") if step else {}
    return {key: str(value) for key, value in table.items()}


def _max_tokens(step: Step | None, config: Mapping[str, Any], file: Path) -> int | None:
    told = whole(step.config, "max_length", where=file) if step else None
    return told or whole(config, "tokenizer_max_length", where=file)
