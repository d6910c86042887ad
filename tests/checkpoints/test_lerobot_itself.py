"""LeRobot's own loader, processors and network on folders that vivace wrote. Needs lerobot, which CI lacks.

LeRobot's sizes stand in its source, so for folders of other sizes its three places are told ours, as for the golden
fixtures; nothing else of it is changed. The sizes as they stand are compared tensor by tensor, without memory.
How to run this: docs/guides/training.md.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vivace
from vivace.checkpoints import bundled
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.checkpoints.open import open_checkpoint
from vivace.config import EngineConfig, ModelConfig
from vivace.train.export import Trained, export
from vivace.types import Observation

pytest.importorskip("lerobot", reason="lerobot is not installed; docs/guides/training.md says how to run this")
sentencepiece = pytest.importorskip("sentencepiece")
sys.path.insert(0, str(Path(__file__).parent))
lerobot_names = importlib.import_module("lerobot_names")

TASK = "pick up the\nred_cube "


def smaller(monkeypatch: pytest.MonkeyPatch, model: ModelConfig) -> type:
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

    monkeypatch.setattr(module, "get_gemma_config", gemma)
    monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", with_vision)
    monkeypatch.setattr(module, "PiGemmaForCausalLM", with_vocabulary)
    return getattr(module, {"pi0": "PI0Policy", "pi05": "PI05Policy"}[model.kind])


class PieceTokenizer:
    """The folder's own SentencePiece model, called as LeRobot calls transformers' tokenizers (PaliGemma's is gated)."""

    def __init__(self, folder: Path) -> None:
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


def trained(folder: Path, *, dtype: str) -> None:
    """The bundled policy through the exporter of `vivace train`."""
    place = bundled.find(bundled.POLICIES / "conveyor-small")
    policy = vivace.load_policy(place, config=EngineConfig(device="cpu", precision="float32"))
    robot = policy.checkpoint.robot
    state, action = robot.stats[""]
    facts = Trained(
        model=policy.model, state=state, action=action,
        cameras=tuple(name.removeprefix("observation.images.") for name in robot.cameras),
        tokenizer=(place / "tokenizer" / "tokenizer.model").read_bytes(), max_tokens=robot.max_prompt_tokens,
        num_denoise_steps=5, max_committed=policy.checkpoint.rtc.training_max_delay, dtype=dtype,
    )  # fmt: skip
    export(folder, facts)


FOLDERS = {
    "tiny": lambda folder: make_checkpoint(folder, Recipe(horizon=10)),
    "tiny pi0": lambda folder: make_checkpoint(folder, Recipe(kind="pi0", horizon=10)),
    "tiny, stored as bfloat16": lambda folder: make_checkpoint(folder, Recipe(dtype="bfloat16", horizon=10)),
    "small": lambda folder: make_checkpoint(folder, Recipe(size="small", cameras=("a", "b", "c"))),
    "small pi0": lambda folder: make_checkpoint(folder, Recipe(size="small", kind="pi0", horizon=16)),
    "conveyor-small": lambda folder: shutil.copytree(bundled.POLICIES / "conveyor-small", folder),
    "conveyor-small, exported again": lambda folder: trained(folder, dtype="bfloat16"),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path) -> Path:
    """A LeRobot folder that vivace wrote."""
    FOLDERS[request.param](tmp_path / "policy")
    return tmp_path / "policy"


def test_the_names_in_the_file_are_those_of_this_lerobot():
    for kind in ("pi0", "pi05"):
        assert lerobot_names.stored(kind) == lerobot_names.built(kind)


def test_its_loader_takes_the_folder(folder, monkeypatch, capsys):
    """All names required, none left over, and every value that of the file."""
    policy_class = smaller(monkeypatch, open_checkpoint(folder).model)
    policy = policy_class.from_pretrained(folder, strict=True)  # it prints what went wrong, and raises nothing
    said = capsys.readouterr().out
    assert "All keys loaded successfully!" in said
    assert "Warning" not in said
    file, network = load_file(folder / "model.safetensors"), policy.state_dict()
    assert file.keys() == network.keys()
    assert [key for key in file if not torch.equal(file[key].to(network[key].dtype), network[key])] == []


def test_its_actions_are_ours(folder, monkeypatch, capsys):
    """Raw observation to robot actions on both sides: LeRobot's processors and network, and vivace's."""
    from lerobot.policies import make_pre_post_processors

    ours = vivace.load_policy(folder, config=EngineConfig(device="cpu"))
    model, cameras = ours.checkpoint.model, ours.checkpoint.robot.cameras
    theirs = smaller(monkeypatch, model).from_pretrained(folder)
    before, after = make_pre_post_processors(
        theirs.config,
        str(folder),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": PieceTokenizer(folder)}},
    )
    draw = np.random.default_rng(0)
    side = model.vision.image_size
    images = [draw.integers(0, 256, (side - 20 * k, side, 3), dtype=np.uint8) for k in range(len(cameras))]
    state = draw.normal(0, 0.3, ours.checkpoint.robot.state_dim).astype(np.float32)
    noise = draw.normal(size=(model.horizon, model.action_width)).astype(np.float32)
    views = {camera.view: image for camera, image in zip(ours.io.embodiment.cameras, images, strict=True)}
    got = ours.infer(Observation(views, state, TASK), noise=noise).actions
    batch = {name: torch.from_numpy(image).permute(2, 0, 1) / 255 for name, image in zip(cameras, images, strict=True)}
    batch = before({**batch, "observation.state": torch.from_numpy(state), "task": TASK})
    want = after(theirs.predict_action_chunk(batch, noise=torch.from_numpy(noise)[None]))[0].numpy()
    assert want.shape == got.shape == (model.horizon, ours.checkpoint.robot.action_dim)
    error = np.abs(got - want).max()
    with capsys.disabled():
        print(f"\n{folder.parent.name}: max abs difference {error:.2e} of actions up to {np.abs(want).max():.2f}")
    if theirs.config.dtype == "float32":
        assert error < 5e-5, "the tolerance of LeRobot's own float32 fixtures"
    else:
        assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)
    other = after(theirs.predict_action_chunk(batch, noise=torch.from_numpy(noise)[None] + 1))[0].numpy()
    assert np.abs(other - want).max() > 0.01, "the noise does not matter"


def test_a_tensor_too_few_is_noticed(tmp_path, monkeypatch, capsys):
    """What the loader says when a name is missing: the check above can fail."""
    make_checkpoint(tmp_path / "policy", Recipe())
    model = open_checkpoint(tmp_path / "policy").model
    policy_class = smaller(monkeypatch, replace(model, vision=replace(model.vision, layers=model.vision.layers + 1)))
    policy_class.from_pretrained(tmp_path / "policy")
    said = capsys.readouterr().out
    assert "Warning: Could not load state dict" in said
    assert "All keys loaded" not in said
