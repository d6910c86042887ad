"""Requests that are wrong in one way each, and what the pipeline promises for the right ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivace.errors import ConfigError, NumericsError, ObservationError, ShapeError
from vivace.robots.embodiment import embodiment, from_toml
from vivace.robots.io import resolve
from vivace.robots.pipeline import RobotPipeline, prepare_image
from vivace.types import NormStats, Observation, RobotFacts

ZEROS = np.zeros((60, 80, 3), dtype=np.uint8)


def test_a_right_request(pipeline: RobotPipeline, request_of) -> None:
    prepared = pipeline.prepare(request_of())
    assert prepared.images.shape == (2, 3, 224, 224)
    assert prepared.images.dtype == np.uint8
    assert prepared.images.transpose(0, 2, 3, 1).flags.c_contiguous, "stored as cameras give it"
    assert prepared.views == ("base_0_rgb", "left_wrist_0_rgb")
    assert prepared.state_robot.tolist() == [*np.linspace(-0.4, 0.4, 5), 0.25]
    assert prepared.prompt_text.startswith("Task: stack, State: ")
    assert prepared.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"front": None}, "image 'cameras/front' is missing; wanted uint8 \\[h, w, 3\\]"),
        ({"front": ZEROS.astype(np.int32)}, "image 'cameras/front' has the wrong dtype; got int32"),
        ({"front": ZEROS[..., :2]}, "image 'cameras/front' has the wrong shape; got uint8 \\[60, 80, 2\\]"),
        ({"front": ZEROS[:0]}, "image 'cameras/front' is empty"),
        ({"front": np.full((4, 4, 3), np.nan)}, "image 'cameras/front' contains NaN"),
        ({"front": np.full((4, 4, 3), None)}, "image 'cameras/front' has the wrong dtype; got object"),
        ({"front": np.zeros((1, 999, 3), np.uint8)}, "too elongated"),
        ({"cameras/wirst": ZEROS}, "unknown camera 'cameras/wirst'"),
        ({"cameras": {"left": ZEROS}}, "unknown camera 'cameras/left'"),
        ({"joints": None}, "state 'joints' is missing; wanted 5 numbers rad"),
        ({"joints": None, "gripper": None}, "the state is missing; wanted \\['joints', 'gripper'\\]"),
        ({"joints": np.zeros(6)}, "state 'joints' has the wrong size; got float64 \\[6\\]; wanted 5"),
        ({"joints": np.zeros((1, 5))}, "state 'joints' has the wrong size"),
        ({"joints": 1.0}, "state 'joints' has the wrong size"),
        ({"joints": np.array([0, 0, np.nan, 0, 0])}, "state 'joints' is not finite; got nan at index 2"),
        ({"gripper": np.inf}, "state 'gripper' is not finite"),
        ({"joints": np.array(["a"] * 5)}, "state 'joints' has the wrong dtype; got <U1"),
        ({"joints": np.array([None] * 5)}, "state 'joints' has the wrong dtype; got object"),
        ({"joints": [[1], [1, 2]]}, "state 'joints' is not a vector"),
        ({"gripper": True}, "state 'gripper' has the wrong dtype; got bool"),
        ({"prompt": 3}, "prompt 'prompt' is not text; got int"),
        ({"prompt": ["a"]}, "prompt 'prompt' is not text; got list"),
        ({"prompt": b"\xff"}, "prompt 'prompt' is not UTF-8"),
        (
            {"prompt": "w" * 300},
            "the prompt is too long; got 3\\d\\d tokens; wanted at most 200; .*--max-prompt-tokens",
        ),
        ({"tokenized_prompt": np.zeros(3)}, "'tokenized_prompt' is malformed; got float64"),
        ({"tokenized_prompt": "abc"}, "'tokenized_prompt' is malformed"),
        ({"tokenized_prompt": np.array([-1])}, "impossible ids"),
        ({"tokenized_prompt": np.zeros(201, np.int32)}, "too long; got 201 tokens"),
        ({"tokenized_prompt": np.zeros(0, np.int32)}, "no tokens"),
        ({"tokenized_prompt": np.zeros(3, np.int32), "tokenized_prompt_mask": np.ones(2, bool)}, "mask' is malformed"),
        ({"tokenized_prompt": np.zeros(3, np.int32), "tokenized_prompt_mask": np.ones(3)}, "mask' is malformed"),
    ],
)
def test_wrong_requests_name_the_key(pipeline: RobotPipeline, request_of, changes: dict, match: str) -> None:
    with pytest.raises(ObservationError, match=match):
        pipeline.prepare(request_of(**changes))


@pytest.mark.parametrize("request_", [None, 3, [1], "text"])
def test_not_a_request(pipeline: RobotPipeline, request_) -> None:
    with pytest.raises(ObservationError, match="not an observation"):
        pipeline.prepare(request_)


def test_accepted_variations(pipeline: RobotPipeline, request_of) -> None:
    reference = pipeline.prepare(request_of())
    assert pipeline.prepare(request_of(wrist=None)).views == ("base_0_rgb",)
    assert pipeline.prepare(request_of(wrist=None)).images.shape[0] == 1
    for changes in (
        {"gripper": np.array([0.25])},
        {"gripper": np.float32(0.25)},
        {"joints": list(np.linspace(-0.4, 0.4, 5))},
        {"prompt": b"stack"},
        {"prompt": np.array("stack")},
        {"prompt": None, "task": "stack"},
        {"cameras/debug": object()},
        {"reward": 1.0},
    ):
        prepared = pipeline.prepare(request_of(**changes))
        assert prepared.tokens.tolist() == reference.tokens.tolist(), changes
        assert np.array_equal(prepared.images, reference.images)


def test_default_prompt_only_when_absent(pipeline: RobotPipeline, request_of) -> None:
    assert "pick up the cube" in pipeline.prepare(request_of(prompt=None)).prompt_text
    assert pipeline.prepare(request_of(prompt="")).prompt_text.startswith("Task: , State")
    none = replace(pipeline, io=replace(pipeline.io, embodiment=replace(pipeline.io.embodiment, default_prompt=None)))
    with pytest.raises(ObservationError, match="prompt 'prompt' is missing"):
        none.prepare(request_of(prompt=None))
    with pytest.raises(ObservationError, match="prompt 'prompt' is missing"):
        none.prepare(Observation({"base_0_rgb": ZEROS}, np.zeros(6)))


def test_pre_tokenised_prompts_need_no_tokenizer(pipeline: RobotPipeline, request_of) -> None:
    bare = replace(pipeline, tokenizer=None)
    ids = np.array([2, 7, 8, 0, 0], dtype=np.int64)
    mask = np.array([True, True, True, False, False])
    prepared = bare.prepare(request_of(tokenized_prompt=ids, tokenized_prompt_mask=mask, prompt=None))
    assert prepared.tokens.tolist() == [2, 7, 8]
    assert prepared.tokens.dtype == np.int32
    observation = Observation({"base_0_rgb": ZEROS}, np.zeros(6), tokens=np.array([2, 9], dtype=np.int32))
    assert bare.prepare(observation).tokens.tolist() == [2, 9]
    with pytest.raises(ConfigError, match=r"no tokenizer found.*paligemma_tokenizer.model"):
        bare.prepare(request_of())


def test_ids_beyond_the_embedding_are_refused(pipeline: RobotPipeline, request_of) -> None:
    """The stand-in tokenizer's largest id is that of the prompt's largest letter, plus 3."""
    top = int(pipeline.prepare(request_of()).tokens.max())
    for vocabulary in (0, top + 1):  # not known; just enough
        enough = replace(pipeline, io=replace(pipeline.io, vocab_size=vocabulary))
        assert enough.prepare(request_of()).tokens.max() == top
        assert enough.prepare(request_of(tokenized_prompt=np.array([top]))).tokens.tolist() == [top]
    short = replace(pipeline, io=replace(pipeline.io, vocab_size=top))
    with pytest.raises(ObservationError, match=f"tokenizer 'test' gave .*; got {top}; wanted 0 .. {top - 1}"):
        short.prepare(request_of())
    with pytest.raises(ObservationError, match=f"tokenized_prompt gave .*; got {top}; wanted 0 .. {top - 1}"):
        short.prepare(request_of(tokenized_prompt=np.array([2, top])))
    with pytest.raises(ObservationError, match=f"tokenized_prompt gave .*; got {top}"):
        short.prepare(Observation({"base_0_rgb": ZEROS}, np.zeros(6), tokens=np.array([top], dtype=np.int32)))


def test_negative_ids_of_a_tokenizer_are_refused(pipeline: RobotPipeline, request_of) -> None:
    class Negative:
        source = "negative"

        def encode(self, text: str, *, add_bos: bool) -> list[int]:
            return [2, -1]

    with pytest.raises(ObservationError, match=r"tokenizer 'negative' gave .*; got -1; wanted >= 0"):
        replace(pipeline, tokenizer=Negative()).prepare(request_of())


@pytest.mark.parametrize(
    ("observation", "match"),
    [
        (Observation({"base_0_rgb": ZEROS, "top": ZEROS}, np.zeros(6), "x"), "unknown view 'top'"),
        (Observation({"left_wrist_0_rgb": ZEROS}, np.zeros(6), "x"), "'cameras/front' is missing"),
        (Observation({"base_0_rgb": ZEROS}, np.zeros(5), "x"), "state 'state' has the wrong size; got float64 \\[5\\]"),
        (Observation({"base_0_rgb": ZEROS}, None, "x"), "the state is missing"),
        (Observation({"base_0_rgb": ZEROS}, np.zeros(6), 5), "not text"),  # type: ignore[arg-type]
        (Observation({"base_0_rgb": ZEROS[..., 0]}, np.zeros(6), "x"), "image 'base_0_rgb' has the wrong shape"),
    ],
)
def test_wrong_observations(pipeline: RobotPipeline, observation: Observation, match: str) -> None:
    with pytest.raises(ObservationError, match=match):
        pipeline.prepare(observation)


def known(name: str, kind, facts: RobotFacts, characters) -> RobotPipeline:
    stats = NormStats(mean=np.zeros(32), std=np.ones(32), q01=-np.ones(32), q99=np.ones(32))
    return RobotPipeline(resolve(replace(facts, stats={"x": (stats, stats)}), kind, embodiment=name), characters)


def test_aloha_cameras(openpi_facts: RobotFacts, characters) -> None:
    pipeline = known("aloha", "pi05", openpi_facts, characters)
    image = np.zeros((3, 24, 32), dtype=np.uint8)
    request = {"images": {"cam_high": image, "cam_low": image}, "state": np.zeros(14), "prompt": "x"}
    assert pipeline.prepare(request).views == ("base_0_rgb",)
    with pytest.raises(ObservationError, match="unknown camera 'images/cam_hihg'"):
        pipeline.prepare({**request, "images": {"cam_high": image, "cam_hihg": image}})
    with pytest.raises(ObservationError, match="'images/cam_high' is missing"):
        pipeline.prepare({**request, "images": {"cam_left_wrist": image}})
    with pytest.raises(ObservationError, match="wanted uint8 or float in \\[0, 1\\], \\[3, h, w\\]"):
        pipeline.prepare({**request, "images": {"cam_high": np.moveaxis(image, 0, -1)}})


def test_libero_without_state_in_the_prompt_needs_no_state(openpi_facts: RobotFacts, characters) -> None:
    request = {"observation/image": ZEROS, "observation/wrist_image": ZEROS, "prompt": "x"}
    prepared = known("libero", "pi05", openpi_facts, characters).prepare(request)
    assert prepared.prompt_text == "x\n"
    assert prepared.state.tolist() == [0.0] * 32
    with pytest.raises(ObservationError, match="the state is missing"):
        known("libero", "pi0", replace(openpi_facts, prompt="openpi_pi0"), characters).prepare(request)


def test_lerobot_cameras(lerobot_facts: RobotFacts, characters) -> None:
    pipeline = RobotPipeline(resolve(lerobot_facts, "pi05"), characters)
    state = np.zeros(6, dtype=np.float32)
    prepared = pipeline.prepare({"observation.images.wrist": ZEROS, "observation.state": state, "task": "x"})
    assert prepared.views == ("wrist",)
    assert prepared.images.dtype == np.float32
    assert prepared.state_normalized.dtype == np.float32
    with pytest.raises(ObservationError, match=r"unknown camera 'observation\.images\.wirst'"):
        pipeline.prepare(
            {"observation.images.front": ZEROS, "observation.images.wirst": ZEROS, "state": state, "task": ""}
        )
    with pytest.raises(ObservationError, match="no camera image"):
        pipeline.prepare({"observation.state": state, "task": "x"})
    with pytest.raises(ObservationError, match="not finite"):
        pipeline.prepare({"front": ZEROS, "state": np.full(6, 1e300), "task": "x"})


def test_finish_guards_the_robot(pipeline: RobotPipeline, request_of) -> None:
    prepared = pipeline.prepare(request_of())
    actions = np.zeros((4, 32), dtype=np.float32)
    out = pipeline.finish(actions, prepared)
    assert out.shape == (4, 6)
    assert out.dtype == np.float64
    actions[2, 31] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        pipeline.finish(actions, prepared)
    for wrong in (np.zeros((4, 7), np.float32), np.zeros((1, 4, 32), np.float32)):
        with pytest.raises(ShapeError):
            pipeline.finish(wrong, prepared)


def test_finish_order_by_hand(pipeline: RobotPipeline, request_of) -> None:
    """Un-normalise, then add the raw state to the delta dims only, then crop."""
    prepared = pipeline.prepare(request_of())
    actions = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    q01 = np.linspace(-0.5, 0.5, 6) - 1
    wanted = (actions[:, :6].astype(np.float64) + 1) / 2 * (2 + 1e-6) + q01
    wanted[:, :5] += np.linspace(-0.4, 0.4, 5)
    assert np.abs(pipeline.finish(actions, prepared) - wanted).max() < 1e-6


def test_signs_are_applied_both_ways(openpi_facts: RobotFacts, toml: Path, characters, request_of) -> None:
    signs = (1.0, -1.0, 1.0, -1.0, 1.0, 1.0)
    robot = replace(from_toml(toml), delta_mask=(), joint_signs=signs)
    pipeline = RobotPipeline(resolve(openpi_facts, "pi05", embodiment=robot), characters)
    plain = RobotPipeline(resolve(openpi_facts, "pi05", embodiment=replace(robot, joint_signs=())), characters)
    prepared = pipeline.prepare(request_of())
    assert np.array_equal(prepared.state_robot, plain.prepare(request_of()).state_robot * signs)
    actions = np.ones((2, 32), dtype=np.float32)
    assert np.array_equal(pipeline.finish(actions, prepared), plain.finish(actions, prepared) * signs)


def test_requests_do_not_influence_each_other(pipeline: RobotPipeline, request_of) -> None:
    first = request_of()
    before = pipeline.prepare(first)
    kept = {key: np.array(value) for key, value in first.items()}
    pipeline.prepare(request_of(front=ZEROS, joints=np.ones(5), prompt="other"))
    after = pipeline.prepare(first)
    assert np.array_equal(before.images, after.images)
    assert before.tokens.tolist() == after.tokens.tolist()
    for key, value in kept.items():
        assert np.array_equal(value, first[key]), f"{key} was changed"


def test_embodiments_are_plain_values() -> None:
    assert embodiment("aloha", "pi0") == embodiment("aloha", "pi0")


class Late:
    """Stands in for the threads: notes that it was asked, and finishes in the opposite order."""

    def __init__(self) -> None:
        self.asked = 0

    def map(self, function, images):
        self.asked += 1
        done = {index: function(images[index]) for index in reversed(range(len(images)))}
        return [done[index] for index in range(len(images))]


@pytest.mark.parametrize(("side", "threads"), [(480, 1), (224, 0)])
def test_large_views_are_resized_side_by_side_and_keep_their_order(
    pipeline: RobotPipeline, request_of, side: int, threads: int
) -> None:
    late = Late()
    request = request_of()
    rng = np.random.default_rng(0)
    for camera in pipeline.io.embodiment.cameras:
        request[camera.key] = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    got = replace(pipeline, workers=late).prepare(request).images
    assert late.asked == threads
    alone = [prepare_image(request[camera.key], pipeline.io) for camera in pipeline.io.embodiment.cameras]
    assert np.array_equal(got, np.stack(alone))
    assert np.array_equal(got, pipeline.prepare(request).images)


@pytest.mark.parametrize(
    "changes",
    [{"joints": np.full(5, np.nan)}, {"prompt": 3}, {"cameras/wirst": ZEROS}],
    ids=["state", "prompt", "camera"],
)
def test_words_are_checked_after_the_pictures_are_handed_over(pipeline: RobotPipeline, request_of, changes) -> None:
    """A GPU begins with the pictures while the rest is looked at; what is wrong there is said all the same."""
    good = pipeline.see(request_of())
    seen = pipeline.see(request_of(**changes))
    assert np.array_equal(seen.images, good.images)
    with pytest.raises(ObservationError):
        pipeline.read(seen)
