"""LeRobot policy folders: config.json says the sizes, the processor files say how robot data is scaled (lerobot_robot.py).

The folder does not say which LeRobot wrote it, and that matters: 0.4 letterboxes images with another value and pads the
state before it goes into the prompt. What differs on disk (compared wheel by wheel):
  0.4.x   no relative_actions/delta_actions step; lm_head and embed_tokens tied, so only one is stored
  0.5.0   no such step either; both are stored
  0.5.1+  the step is there, enabled or not
config.json is the same in 0.4.4 and 0.5.0. The guess is noted; `lerobot_version` overrides it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, Unsupported
from . import names
from .dialects import Translated, translate
from .folder import as_flag, as_table, read_json, read_weights, settings_with, whole
from .lerobot_robot import RELATIVE_STEPS, Processors, read_processors, robot_facts
from .settings import Asked, LeRobotVersion, choose_horizon, declared_dtype, positive
from .source import Checkpoint, RtcFacts

SCHEDULES = ("LINEAR", "EXP", "ONES", "ZEROS")


def open_lerobot(folder: Path, asked: Asked) -> Checkpoint:
    """Open a folder that LeRobot's `save_pretrained` wrote, versions 0.4 to 0.6."""
    file = folder / "config.json"
    config = read_json(file)
    _refuse(config, file)
    found = translate(read_weights(folder), where=str(folder))
    processors = read_processors(folder)
    version, notes = _version(asked.lerobot_version, processors, found)
    own, own_file = settings_with(folder, "vision_num_attention_heads")
    hints = names.Hints(
        vision_heads=asked.vision_heads or whole(own, "vision_num_attention_heads", where=own_file),
        num_heads=asked.num_heads,
        head_dim=asked.head_dim,
    )
    model = names.infer_model(found.tensors, hints=hints, where=str(folder))
    horizon, horizon_notes, guesses = choose_horizon(asked.horizon, whole(config, "chunk_size", where=file), file.name)
    model = _numerics(replace(model, horizon=horizon), config, version, file)
    _check_agreement(config, model, file)
    robot = robot_facts(folder, config, processors, kind=model.kind, version=version)
    if notes:
        guesses["lerobot_version"] = f"{version}; set it with lerobot_version (--lerobot-version)"
    return Checkpoint(
        path=folder,
        origin="lerobot",
        model=model,
        robot=robot,
        tensors=names.in_order(found.tensors, model),
        dead=found.dead,
        notes=(*found.notes, *notes, *horizon_notes, *robot.notes),
        rtc=_rtc(config, folder, model.horizon),
        num_denoise_steps=whole(config, "num_inference_steps", where=file),
        guesses=guesses,
    )


def _refuse(config: dict[str, Any], file: Path) -> None:
    if config.get("type") not in ("pi0", "pi05"):
        raise CheckpointError(
            f"{file} is of another policy", got=f"type {config.get('type')!r}", wanted="type 'pi0' or 'pi05'"
        )
    memory = [
        key for key in ("use_visual_memory", "use_proprioceptive_memory") if as_flag(config.get(key), f"{file}: {key}")
    ]
    if memory:
        raise Unsupported(
            f"{file}: this policy remembers earlier observations, which vivace does not run",
            got=f"{', '.join(memory)} = true",
            wanted="a policy without memory",
            do="train or take one with both set to false",
        )


def _version(asked: LeRobotVersion, processors: Processors, found: Translated) -> tuple[LeRobotVersion, list[str]]:
    """Which LeRobot wrote the folder, and a note where that is a guess."""
    if asked != "auto":
        return asked, []
    if any(step.name in RELATIVE_STEPS for step in processors.pre):
        return "0.6", []
    if not processors.pre:
        return "0.6", ["no policy_preprocessor.json: LeRobot 0.6 behaviour is assumed"]
    if found.embedding_untied:
        return "0.5", [
            "no relative_actions step, lm_head and embed_tokens both stored: written by LeRobot 0.5.0, it seems"
        ]
    return "0.4", [
        "no relative_actions step, one embedding table: written by LeRobot 0.4, it seems; images are padded with -1 before "
        "scaling and the state is padded to 32 values in the prompt, as 0.4 did"
    ]


def _numerics(model: ModelConfig, config: dict[str, Any], version: LeRobotVersion, file: Path) -> ModelConfig:
    return replace(
        model,
        time_grid="direct",
        time_embedding="float64",
        declared_dtype=declared_dtype(config, ("dtype",), "float32", where=file),
        # 0.4 keeps the same few parameters in float32 as openpi; 0.5 began to keep the whole vision tower there.
        flavour="openpi_torch" if version == "0.4" else "lerobot",
        min_period=positive(config, "min_period", model.min_period, where=file),
        max_period=positive(config, "max_period", model.max_period, where=file),
    )


def _check_agreement(config: dict[str, Any], model: ModelConfig, file: Path) -> None:
    if config["type"] != model.kind:
        raise CheckpointError(
            f"{file} contradicts the weights", got=f"type {config['type']!r}, but the tensors are those of {model.kind}"
        )
    width = whole(config, "max_action_dim", where=file)
    if width is not None and width != model.action_width:
        raise CheckpointError(
            f"{file} contradicts the weights",
            got=f"max_action_dim {width}, but action_in_proj takes {model.action_width}",
        )
    size = config.get("image_resolution")
    if size is not None and size != [model.vision.image_size] * 2:
        raise CheckpointError(
            f"{file} contradicts the weights",
            got=f"image_resolution {size}, but the position table is for {model.vision.image_size} pixels",
        )


def _rtc(config: dict[str, Any], folder: Path, horizon: int) -> RtcFacts | None:
    file = folder / "config.json"
    trained = _trained_delay(folder, horizon)
    if config.get("rtc_config") is None and not trained:
        return None
    table = as_table(config.get("rtc_config"), f"{file}: rtc_config")
    mode, schedule = table.get("mode", "guided"), str(table.get("prefix_attention_schedule", "LINEAR")).upper()
    if mode not in ("guided", "trained") or schedule not in SCHEDULES:
        raise CheckpointError(
            f"{file}: rtc_config cannot be used",
            got=f"mode {mode!r}, prefix_attention_schedule {schedule!r}",
            wanted=f"mode guided or trained, schedule one of {SCHEDULES}",
        )
    try:
        return RtcFacts(
            enabled=as_flag(table.get("enabled", bool(table)), f"{file}: rtc_config.enabled"),
            mode=mode,
            schedule=schedule,
            max_guidance=float(table.get("max_guidance_weight", 10.0)),
            execution_horizon=int(table.get("execution_horizon", 10)),
            training_max_delay=trained,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: rtc_config cannot be used", got=str(error)[:100]) from error


def _trained_delay(folder: Path, horizon: int) -> int:
    """rtc_training_max_delay, 0 where nothing says it. Below the horizon, as `vivace train` wants it too."""
    settings, file = settings_with(folder, "rtc_training_max_delay")
    value = settings.get("rtc_training_max_delay")
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < horizon:
        raise CheckpointError(
            f"{file}: rtc_training_max_delay cannot be used", got=repr(value)[:60],
            wanted=f"a whole number of ticks from 0 to {horizon - 1}, below the horizon of {horizon}",
        )  # fmt: skip
    return value
