"""Host stages of every policy fixture: pixels, normalised state, tokens going in; robot actions coming out.

The network is not run: its recorded output (`actions_normalized`) is what `finish` is given.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_cases import POLICIES, open_case
from vivace.robots.embodiment import embodiment
from vivace.robots.images import view_pil, view_torch
from vivace.robots.io import resolve
from vivace.robots.pipeline import RobotPipeline
from vivace.robots.tokenizer import load_tokenizer
from vivace.types import PreparedObservation


@dataclass(frozen=True)
class Case:
    facts: dict[str, Any]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    pipeline: RobotPipeline

    @property
    def openpi(self) -> bool:
        return self.facts["flavour"].startswith("openpi")

    def request(self) -> dict[str, Any]:
        if self.openpi:
            arrays = {key.removeprefix("obs:"): v for key, v in self.inputs.items() if key.startswith("obs:")}
            return {**arrays, "prompt": self.facts["task"]}
        arrays = {key: v for key, v in self.inputs.items() if key.startswith("images.") or key == "state"}
        return {**arrays, "task": self.facts["task"]}

    def prepare(self) -> PreparedObservation:
        return self.pipeline.prepare(self.request())


def load(folder: Path) -> Case:
    old = folder.name.startswith("lerobot04")
    facts, checkpoint = open_case(folder, lerobot_version="0.4" if old else "auto")
    robot = None
    if facts.get("embodiment"):
        known = facts["embodiment"]
        robot = replace(
            embodiment(known["name"], facts["model"]),
            delta_mask=tuple(known["delta_mask"]),
            state_in_prompt=facts["discrete_state_input"],
        )
    io = resolve(checkpoint.robot, facts["model"], embodiment=robot)
    assert io.max_prompt_tokens == facts["max_token_len"]
    tokenizer = load_tokenizer(folder / facts["tokenizer"])
    return Case(
        facts,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "expected.safetensors"),
        RobotPipeline(io, tokenizer),
    )


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> dict[str, Case]:
    present = {
        path.parent.name for path in golden_dir.glob("*/case.json") if json.loads(path.read_text())["kind"] == "policy"
    }
    assert present == set(POLICIES)
    return {name: load(golden_dir / name) for name in POLICIES}


@pytest.fixture(params=POLICIES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_state_is_normalised(case: Case) -> None:
    got, wanted = case.prepare().state_normalized, case.expected["state_normalized"]
    assert got.dtype == wanted.dtype
    error = np.abs(got - wanted) / np.maximum(1, np.abs(wanted))
    assert error.max() <= (1e-15 if case.openpi else 0)


def test_prompt_and_tokens(case: Case) -> None:
    prepared = case.prepare()
    assert prepared.prompt_text == case.facts["prompt"]
    wanted = case.expected["tokens"][case.expected["token_mask"]]
    assert prepared.tokens.tolist() == wanted.tolist()
    assert len(prepared.tokens) == case.facts["num_valid_tokens"]


def test_pixels_are_exact(case: Case) -> None:
    prepared = case.prepare()
    assert prepared.images.shape == (len(case.facts["views"]), 3, 224, 224)
    for i, image in enumerate(prepared.images):
        if f"images_u8.{i}" in case.expected:
            assert np.array_equal(np.moveaxis(image, 0, -1), case.expected[f"images_u8.{i}"])
        if f"images.{i}" in case.expected:
            assert np.array_equal(image[:, ::2, ::2], case.expected[f"images.{i}"])
            assert np.abs(image.mean((1, 2), dtype=np.float64) - case.expected[f"images_mean.{i}"]).max() < 1e-12


def test_other_resize_flavour_differs(cases: dict[str, Case]) -> None:
    case = cases["openpi_pytorch_pi05_fp32"]
    image = case.inputs["obs:observation/exterior_image_1_left"]
    other = np.rint((view_torch(image) + 1) * 127.5).astype(np.uint8)
    assert np.abs(other.astype(int) - view_pil(image)).max() > 5


def test_views_are_those_present(case: Case) -> None:
    views = case.prepare().views
    assert len(views) + len(case.facts["masked_views"]) == len(case.facts["views"]) + len(case.facts["masked_views"])
    named = [view.get("slot") or view["input"].removeprefix("images.") for view in case.facts["views"]]
    assert list(views) == named


def test_actions_come_back_to_the_robot(case: Case) -> None:
    prepared = case.prepare()
    actions = case.pipeline.finish(case.expected["actions_normalized"], prepared)
    wanted = case.expected["actions"]
    assert actions.dtype == wanted.dtype
    assert actions.shape == wanted.shape
    # openpi echoes the state through normalise and back (JAX: through float32), which costs it a rounding we do not make
    bound = {"openpi_jax": 1e-6, "openpi_pytorch": 1e-14}.get(case.facts["flavour"], 0)
    assert np.abs(actions - wanted).max() <= bound


def test_forgetting_the_state_shows(cases: dict[str, Case]) -> None:
    for name in ("openpi_pytorch_pi0_fp32", "openpi_jax_pi0_lora", "lerobot_pi0_relative_fp32"):
        case = cases[name]
        prepared = case.prepare()
        moved = replace(prepared, state_robot=prepared.state_robot + 1)
        difference = case.pipeline.finish(case.expected["actions_normalized"], moved) - case.expected["actions"]
        assert np.abs(difference).max() > 0.9, name


def test_padded_state_is_float32_and_zero_filled(case: Case) -> None:
    prepared = case.prepare()
    n = len(prepared.state_normalized)
    assert prepared.state.dtype == np.float32
    assert prepared.state.shape == (32,)
    assert np.array_equal(prepared.state[:n], prepared.state_normalized.astype(np.float32))
    assert not prepared.state[n:].any()


def test_lerobot_names_of_a_camera_are_equal(cases: dict[str, Case]) -> None:
    case = cases["lerobot_pi0_relative_fp32"]
    image, state = case.inputs["images.front"], case.inputs["state"]
    spellings = [
        {"observation.images.front": image, "observation.state": state, "task": case.facts["task"]},
        {"front": image, "state": state, "prompt": case.facts["task"]},
        {"images": {"front": image}, "state": state, "task": case.facts["task"]},
        {"observation": {"images": {"front": image}, "state": state}, "prompt": case.facts["task"]},
        {"observation/images/front": image, "observation/state": state, "prompt": case.facts["task"]},
    ]
    reference = case.prepare()
    for request in spellings:
        prepared = case.pipeline.prepare(request)
        assert np.array_equal(prepared.images, reference.images), list(request)
        assert np.array_equal(prepared.state_normalized, reference.state_normalized)
        assert np.array_equal(prepared.tokens, reference.tokens)


def test_openpi_flat_nested_and_observation_are_equal(cases: dict[str, Case]) -> None:
    from vivace.types import Observation

    for name in ("openpi_pytorch_pi0_fp32", "openpi_pytorch_pi05_fp32", "openpi_jax_pi05"):
        case = cases[name]
        flat = case.request()
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            *heads, last = key.split("/")
            place = nested
            for head in heads:
                place = place.setdefault(head, {})
            place[last] = value
        reference = case.pipeline.prepare(flat)
        cameras = case.pipeline.io.embodiment.cameras
        views = {c.view: np.moveaxis(flat[c.key], 0, -1) if c.chw else flat[c.key] for c in cameras if c.key in flat}
        state = np.concatenate([flat[part.key] for part in case.pipeline.io.embodiment.state])
        observation = Observation(views, state, case.facts["task"], t_obs=1.5)
        for request in (nested, observation):
            prepared = case.pipeline.prepare(request)
            assert np.array_equal(prepared.images, reference.images)
            assert np.array_equal(prepared.state_normalized, reference.state_normalized)
            assert np.array_equal(prepared.tokens, reference.tokens)
        assert case.pipeline.prepare(observation).t_obs == 1.5


def test_known_asset_ids_name_their_robot(golden_dir: Path) -> None:
    wanted = {"openpi_pytorch_pi05_fp32": "droid", "openpi_pytorch_pi0_fp32": "aloha", "openpi_jax_pi0_lora": "libero"}
    for name, robot in wanted.items():
        facts, checkpoint = open_case(golden_dir / name)
        io = resolve(checkpoint.robot, facts["model"])
        assert io.embodiment.name == robot
        assert list(io.embodiment.delta_mask) == facts["embodiment"]["delta_mask"]


def test_checkpoints_own_tokenizer_folder(golden_dir: Path, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["lerobot_pi05_rtc_trained"]
    own = load_tokenizer(None, checkpoint_dir=golden_dir / "lerobot_pi05_rtc_trained" / "checkpoint", home=tmp_path)
    prepared = RobotPipeline(case.pipeline.io, own).prepare(case.request())
    assert prepared.tokens.tolist() == case.prepare().tokens.tolist()
