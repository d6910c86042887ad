"""realtime-vla beside ours: our weights in its layout give our actions, and the ratio of the same rounds is judged.

Its code is not part of this project; a stand-in takes its place, which computes from its layout in its own way.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import eager
from vivace.check import bench, hopper, hopper_estimate, hopper_realtime_vla, hopper_rivals, hopper_rows
from vivace.check.hopper_engines import CONFIG
from vivace.check.targets import Size
from vivace.errors import ConfigError, Unsupported
from vivace.types import ModelInputs

STAND_IN = Path(__file__).with_name("realtime_vla_stand_in.py")
HEADLINE = "cuda_graph fp8-all"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the engine's files."""
    folder = tmp_path / "realtime-vla"
    folder.mkdir()
    shutil.copy(STAND_IN, folder / "pi05_infer.py")
    (folder / "pi0_infer.py").write_text("VISION_HEADS = 2\n")
    yield folder
    for name in hopper_realtime_vla.FILES:
        sys.modules.pop(name, None)


def observation(config, *, views=2, tokens=5):
    g = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    images = torch.randint(0, 256, (1, views, 3, size, size), dtype=torch.uint8, generator=g)
    prompt = torch.randint(0, config.vocab_size, (1, tokens), generator=g)
    return ModelInputs(images, prompt), torch.randn(1, config.horizon, 32, generator=g)


@pytest.mark.parametrize("tokens", [5, 0])
def test_our_weights_in_its_layout_give_our_actions(clone, tokens):
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    size = Size(views=2, prompt_tokens=tokens, horizon=config.horizon)
    engine = hopper_realtime_vla.make(clone, model, size)
    inputs, noise = observation(config, tokens=tokens)
    wanted = eager.create(model, CONFIG).infer(inputs, noise)
    got = engine.backend.infer(inputs, noise)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    again = engine.backend.graph_of(inputs, noise)
    torch.testing.assert_close(again()[None], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(again(), again()), "each call begins with the noise"
    assert not engine.ours
    assert type(engine.backend._engine).made[-1].checkpoint is None
    if tokens:  # control: a prompt that changes is seen
        other = replace(inputs, tokens=(inputs.tokens + 1) % config.vocab_size)
        assert not torch.allclose(engine.backend.infer(other, noise), wanted, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["encoder_attn_qkv_w", "decoder_attn_qkv_w", "decoder_pre_ffn_norm_mod_w", "encoder_ffn_up_w"]
)
def test_a_layout_that_is_wrong_somewhere_is_seen(clone, monkeypatch, name):
    """The stand-in reads every matrix: with rows in another order the actions differ."""
    config = tiny_config("pi05")
    model, real = build(config, random_tensors(config)), hopper_realtime_vla.checkpoint_of

    def wrong(model, **how):
        made = real(model, **how)
        return {**made, name: made[name].flip(-1)}

    monkeypatch.setattr(hopper_realtime_vla, "checkpoint_of", wrong)
    engine = hopper_realtime_vla.make(clone, model, Size(views=2, prompt_tokens=5, horizon=config.horizon))
    inputs, noise = observation(config)
    wanted = eager.create(model, CONFIG).infer(inputs, noise)
    assert not torch.allclose(engine.backend.infer(inputs, noise), wanted, rtol=1e-3, atol=1e-3)


def test_what_it_cannot_run_is_refused(clone, tmp_path):
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    per_view = config.vision.tokens
    with pytest.raises(Unsupported, match="attends to 1024 positions"):
        hopper_realtime_vla.make(clone, model, Size(views=1, prompt_tokens=1025 - per_view - 6, horizon=6))
    (clone / "pi0_infer.py").unlink()
    with pytest.raises(ConfigError, match=r"no realtime-vla there; got .* without pi0_infer\.py"):
        hopper_realtime_vla.make(clone, model, Size(views=1, prompt_tokens=4, horizon=6))


def test_another_prompt_length_is_refused(clone):
    config = tiny_config("pi05")
    engine = hopper_realtime_vla.make(
        clone, build(config, random_tensors(config)), Size(views=2, prompt_tokens=4, horizon=config.horizon)
    )
    with pytest.raises(ConfigError, match="one prompt length"):
        engine.backend.infer(*observation(config, tokens=5))
    with pytest.raises(Unsupported):
        engine.backend.prefill(observation(config)[0])


def test_importing_it_leaves_nothing_behind(clone):
    before = list(sys.path), "transformers" in sys.modules
    assert hopper_realtime_vla.load(clone).Pi05Inference
    assert (list(sys.path), "transformers" in sys.modules) == before


# --- in the benchmark -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, clone):
    """The phase with the tiny network; nothing has to settle before it is timed."""
    monkeypatch.setattr(hopper_rows, "WARM_UP", bench.WarmUp(max_calls=2))
    monkeypatch.setattr(hopper, "NEEDS_GPU", ())

    def call(*more, settings="1,48,50;2,0,6", plans="bf16,fp8-all"):
        arguments = [
            "--out", str(tmp_path / "h.json"), "--settings", settings, "--plans", plans, "--network", "tiny",
            "--device", "cpu", "--observations", "2", "--draws", "1", "--calibration", "1", "--rival-calls", "4",
            "--rival-settings", "0", "--plain-settings", "0", "--realtime-vla", str(clone), *more,
        ]  # fmt: skip
        options = hopper.options_of(hopper.parser().parse_args(arguments))
        return hopper.run(options, phases=("rivals",), size="tiny", device="cpu", tell=lambda _: None)

    return call


def test_every_setting_is_timed_in_the_same_rounds_and_the_ratio_is_judged(run):
    document = run()
    assert [(row["engine"], row["boundary"], row["setting"]) for row in document["rows"]] == [
        ("realtime-vla", "B0", "1,48,50"), ("realtime-vla", "B0", "2,0,6"),
    ]  # fmt: skip
    first, second = document["rows"]
    assert first["latency"]["samples"] == first["bit_identical"]["same"] == 4
    ratio = first["ours_in_the_same_rounds"][HEADLINE]["ratio"]
    (mark,) = first["targets"]
    assert (mark["got"], mark["must"], mark["stretch"], mark["rule"]) == (ratio, 2.2, 3.0, "at least")
    assert second["targets"] == [], "no mark for a setting that targets do not name"
    assert [row["engine"] for row in document["accuracy"]] == ["realtime-vla"] * 2
    assert all(row["cosine_worst"] > 0.99 and row["targets"] == [] for row in document["accuracy"])
    assert all("realtime-vla" not in row["what"] for row in document["not_run"]), "it was run"
    files = document["setup"]["realtime-vla"]
    assert files["pi05_infer.py"] == hashlib.sha256(STAND_IN.read_bytes()).hexdigest()
    assert set(files) == {"pi05_infer.py", "pi0_infer.py"}
    assert mark["what"] == "realtime-vla's p50 over that of fp8-all"
    assert document["passed"] == (ratio >= 2.2)


def test_a_folder_without_it_is_refused_before_anything_is_made(run, clone, monkeypatch):
    monkeypatch.setattr(hopper, "_prepared", lambda *_, **__: pytest.fail("weights were made first"))
    (clone / "pi05_infer.py").unlink()
    with pytest.raises(ConfigError, match=r"without pi05_infer\.py"):
        run()


def test_without_the_headline_plan_nothing_is_judged(run):
    document = run(settings="1,48,50", plans="bf16")
    assert [row["targets"] for row in document["rows"]] == [[]]


def test_an_engine_that_computes_something_else_is_not_timed(run, monkeypatch):
    real = hopper_realtime_vla.checkpoint_of

    def other_way(model, **how):
        return {name: -value if "action_out" in name else value for name, value in real(model, **how).items()}

    monkeypatch.setattr(hopper_realtime_vla, "checkpoint_of", other_way)
    document = run(settings="1,48,50")
    assert document["rows"] == []
    (line,) = [row for row in document["not_run"] if not row["informational"]]
    assert line["what"] == "1,48,50 realtime-vla"
    assert "cosine" in line["why"]


def test_it_waits_for_its_time_and_the_estimate_knows_it(run, monkeypatch):
    base = hopper.options_of(hopper.parser().parse_args(["--out", "h.json"]))
    asked = replace(base, realtime_vla=Path("x"))
    one_s = hopper_estimate.realtime_vla_s(asked)
    found = [hopper_estimate.seconds(o, ["rivals"])["rivals"] for o in (base, asked)]
    assert found[1] - found[0] == pytest.approx(5 * one_s)
    monkeypatch.setattr(hopper_rivals.Run, "left_s", property(lambda run: 1.0))
    document = run()
    assert document["rows"] == []
    assert [row["what"] for row in document["not_run"] if "realtime-vla" in row["what"]] == [
        "1,48,50 realtime-vla", "2,0,6 realtime-vla",
    ]  # fmt: skip
