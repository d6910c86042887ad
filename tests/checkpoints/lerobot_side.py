"""LeRobot's own loader, processors and network on one of our folders, and what comes out of them beside ours.

LeRobot's sizes stand in its source, so for folders of other sizes its three places are told ours (`told_our_sizes`), as for
the golden fixtures; nothing else of it is changed. Used by test_lerobot_itself.py and benchmarks/lerobot_itself.py; only
what is called imports lerobot.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

import vivace
from vivace.checkpoints import bundled
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.checkpoints.open import open_checkpoint
from vivace.config import EngineConfig, ModelConfig
from vivace.train.export import Trained, export
from vivace.types import Observation

TASK = "pick up the\nred_cube "


@contextlib.contextmanager
def told_our_sizes(model: ModelConfig) -> Iterator[type]:
    """LeRobot's policy class, with the sizes of `model` where its source has those of the released networks."""
    module = importlib.import_module(f"lerobot.policies.{model.kind}.modeling_{model.kind}")
    paligemma, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def gemma(variant: str):
        stack = {"gemma_2b": model.prefix, "gemma_300m": model.expert}[variant]
        return module.GemmaConfig(
            stack.width, stack.layers, stack.mlp_width, stack.num_heads, stack.num_kv_heads, stack.head_dim
        )

    def with_vision(config):
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = model.vision.width, model.vision.mlp_width
        vision.num_hidden_layers, vision.num_attention_heads = model.vision.layers, model.vision.num_heads
        vision.patch_size, vision.projection_dim = model.vision.patch_size, model.prefix.width
        config.text_config.vocab_size = model.vocab_size
        return paligemma(config)

    def with_vocabulary(config):
        config.vocab_size = model.vocab_size
        return expert(config)

    with mock.patch.multiple(
        module, get_gemma_config=gemma, PaliGemmaForConditionalGenerationWithPiGemma=with_vision,
        PiGemmaForCausalLM=with_vocabulary,
    ):  # fmt: skip
        yield getattr(module, {"pi0": "PI0Policy", "pi05": "PI05Policy"}[model.kind])


def loaded(policy_class: type, folder: Path) -> tuple[Any, str]:
    """LeRobot's policy, and all that its loader printed: it raises nothing where names or shapes do not fit."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        policy = policy_class.from_pretrained(folder, strict=True)
    return policy, said.getvalue()


class PieceTokenizer:
    """The folder's own SentencePiece model, called as LeRobot calls transformers' tokenizers (PaliGemma's is gated)."""

    def __init__(self, folder: Path) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))

    def __call__(self, text, *, max_length, truncation, padding, padding_side, return_tensors):
        assert (truncation, padding, padding_side, return_tensors) == (True, "max_length", "right", "pt")
        ids = torch.zeros(len(text), max_length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, line in enumerate(text):
            found = [self.pieces.bos_id(), *self.pieces.encode(line)]
            assert len(found) <= max_length
            ids[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def trained(folder: Path) -> None:
    """The bundled policy through the exporter of `vivace train`."""
    place = bundled.find(bundled.POLICIES / "conveyor-small")
    policy = vivace.load_policy(place, config=EngineConfig(device="cpu", precision="float32"))
    robot = policy.checkpoint.robot
    state, action = robot.stats[""]
    facts = Trained(
        model=policy.model, state=state, action=action,
        cameras=tuple(name.removeprefix("observation.images.") for name in robot.cameras),
        tokenizer=(place / "tokenizer" / "tokenizer.model").read_bytes(), max_tokens=robot.max_prompt_tokens,
        num_denoise_steps=5, max_committed=policy.checkpoint.rtc.training_max_delay, dtype="bfloat16",
    )  # fmt: skip
    export(folder, facts)


SIZES = {
    "tiny": {"horizon": 10},
    "tiny pi0": {"kind": "pi0", "horizon": 10},
    "small": {"size": "small", "cameras": ("a", "b", "c")},
    "small pi0": {"size": "small", "kind": "pi0", "horizon": 16},
}
FOLDERS = {
    **{name: lambda folder, how=how: make_checkpoint(folder, Recipe(**how)) for name, how in SIZES.items()},
    **{
        f"{name}, bfloat16": lambda folder, how=how: make_checkpoint(folder, Recipe(dtype="bfloat16", **how))
        for name, how in SIZES.items()
    },
    "conveyor-small": lambda folder: shutil.copytree(bundled.POLICIES / "conveyor-small", folder),
    "conveyor-small, exported again": trained,
}
"""{case: writes its LeRobot folder}. Both conveyor-small store bfloat16 and say float32, in which both sides compute."""


def compare(folder: Path) -> dict[str, Any]:
    """One folder in LeRobot and in vivace, told LeRobot the sizes: names, values, and actions from one raw observation.

    dtype            what LeRobot's config says it computes in
    all_keys_loaded  whether its loader said so, with strict=True and without a warning
    tensors          in the file; `equal_tensors` of them have the file's values in LeRobot's network
    missing          names that only the network has; `unexpected`: only the file
    max_abs          largest difference of the actions; `scale`: LeRobot's largest action; `rel_l2`: of the difference
    noise_matters    largest change of LeRobot's actions when its noise is another
    """
    with told_our_sizes(open_checkpoint(folder).model) as policy_class:
        theirs, said = loaded(policy_class, folder)
        file, network = load_file(folder / "model.safetensors"), theirs.state_dict()
        both = file.keys() & network.keys()
        equal = [torch.equal(file[key].to(network[key].dtype), network[key]) for key in both]
        return {
            "dtype": theirs.config.dtype,
            "all_keys_loaded": "All keys loaded successfully!" in said and "Warning" not in said,
            "tensors": len(file), "missing": sorted(network.keys() - file.keys()),
            "unexpected": sorted(file.keys() - network.keys()), "equal_tensors": sum(equal), **_actions(folder, theirs),
        }  # fmt: skip


def _actions(folder: Path, theirs: Any) -> dict[str, Any]:
    """Raw observation to robot actions on both sides: LeRobot's processors and network, and vivace's."""
    from lerobot.policies import make_pre_post_processors

    ours = vivace.load_policy(folder, config=EngineConfig(device="cpu"))
    model, robot = ours.checkpoint.model, ours.checkpoint.robot
    before, after = make_pre_post_processors(
        theirs.config, str(folder),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": PieceTokenizer(folder)}},
    )  # fmt: skip
    draw, side = np.random.default_rng(0), model.vision.image_size
    images = [draw.integers(0, 256, (side - 20 * k, side, 3), dtype=np.uint8) for k in range(len(robot.cameras))]
    state = draw.normal(0, 0.3, robot.state_dim).astype(np.float32)
    noise = draw.normal(size=(model.horizon, model.action_width)).astype(np.float32)
    views = {camera.view: image for camera, image in zip(ours.io.embodiment.cameras, images, strict=True)}
    got = ours.infer(Observation(views, state, TASK), noise=noise).actions
    pixels = {
        name: torch.from_numpy(image).permute(2, 0, 1) / 255 for name, image in zip(robot.cameras, images, strict=True)
    }
    batch = before({**pixels, "observation.state": torch.from_numpy(state), "task": TASK})
    start = torch.from_numpy(noise)[None]
    want = after(theirs.predict_action_chunk(batch, noise=start))[0].numpy()
    other = after(theirs.predict_action_chunk(batch, noise=start + 1))[0].numpy()
    assert want.shape == got.shape == other.shape == (model.horizon, robot.action_dim)
    return {
        "max_abs": float(np.abs(got - want).max()), "scale": float(np.abs(want).max()),
        "rel_l2": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "noise_matters": float(np.abs(other - want).max()), "actions": list(want.shape),
        "checkpoint_hash": ours.engine.checkpoint_hash, "precision": ours.engine.precision,
    }  # fmt: skip
