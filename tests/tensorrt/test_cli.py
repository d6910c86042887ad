"""`vivace build`, and the other verbs asked for a backend that this machine cannot run."""

from __future__ import annotations

import json

import pytest
import torch

from vivace.backends.tensorrt import cache, run, targets
from vivace.backends.tensorrt.networks import Shapes
from vivace.check.observations import synthetic
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.cli.main import main
from vivace.config import EngineConfig, TensorRTConfig, tensorrt_options
from vivace.errors import ConfigError
from vivace.runtime.policy import load_policy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(folder, Recipe(size="tiny", horizon=6, dtype="bfloat16"))
    return folder


@pytest.fixture
def vivace(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out.strip() else None, captured.err

    return call


@pytest.fixture(scope="module")
def recorded(checkpoint, tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("data")
    for index, request in enumerate(synthetic(load_policy(checkpoint).io, 2)):
        np.savez(folder / f"{index}.npz", **request)
    return folder


@pytest.fixture(scope="module")
def plan(checkpoint, recorded):
    path = recorded / "plan.json"
    arguments = ["calibrate", checkpoint, "--data", recorded, "--preset", "fp8-mlp", "--steps", 2, "-o", path]
    assert main([str(argument) for argument in arguments]) == 0
    return path


def test_build(rtx, vivace, checkpoint, plan, tmp_path):
    options = (
        "--target",
        "sm89,sm120",
        "--precision",
        plan,
        "--prompts",
        64,
        "--engines",
        tmp_path,
        "-o",
        tmp_path / "b.json",
    )
    code, result, text = vivace("build", checkpoint, *options)
    assert code == 0
    assert result == json.loads((tmp_path / "b.json").read_text())
    assert [row["part"] for row in result["engines"]] == ["vision", "prefix", "step"]
    assert result["kind"] == "build"
    assert result["module"] == rtx.label
    assert result["environment"]["packages"]["tensorrt-rtx-cu13"] == rtx.version
    assert (result["base"], result["weights"]) == ("bf16", "inputs")
    assert all(row["build_seconds"] > 0 and not row["found_on_disk"] for row in result["engines"])
    e4m3 = {row["layer"] for row in result["coverage"] if row["precision"] == "e4m3"}
    assert e4m3 == {"prefix.layers.0.mlp.gate_up", "prefix.layers.0.mlp.down"}
    assert not any(row["fallback"] for row in result["coverage"])
    assert {row["kernel"] for row in result["coverage"]} == {"tensorrt_rtx"}
    assert "nothing was run" in text
    facts = cache.header(next(tmp_path.glob("prefix-*")))["facts"]
    assert facts["plan_hash"] == result["plan_hash"]
    assert len(facts["checkpoint_hash"]) == 16
    code, again, _ = vivace("build", checkpoint, *options)
    assert code == 0
    assert all(row["found_on_disk"] for row in again["engines"])
    assert again["coverage"] == result["coverage"]


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16+vision", "plan"])
def test_the_backend_finds_what_build_wrote(rtx, vivace, checkpoint, plan, tmp_path, precision):
    """The outline of a checkpoint that was only looked at, and the loaded and quantised model, ask for the same engines."""
    precision = str(plan) if precision == "plan" else precision
    options = ("--target", "sm89", "--precision", precision, "--prompts", 64, "--engines", tmp_path)
    assert vivace("build", checkpoint, *options)[0] == 0
    loaded = load_policy(checkpoint, config=EngineConfig(precision=precision))
    recipe = run.recipe(loaded.model, rtx, TensorRTConfig(), base="bf16", plan=loaded.plan)
    views = 2 * loaded.model.config.vision.tokens
    for part, shapes in (
        ("vision", Shapes(batch=2)),
        ("prefix", Shapes(keys=views + 64)),
        ("step", Shapes(keys=views + 64)),
    ):
        made = run.make(recipe, part, shapes, targets=targets.parse("sm89"), where=tmp_path)
        assert made.seconds == 0.0, f"{part} was built again"


def test_build_with_weights_inside(rtx, vivace, checkpoint, plan, tmp_path):
    code, result, _ = vivace(
        "build", checkpoint, "--target", "sm120", "--precision", plan, "--weights", "baked", "--base", "fp16",
        "--parts", "prefix", "--views", 1, "--prompts", 10, "--engines", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert (result["base"], result["weights"]) == ("fp16", "baked")
    assert [row["label"] for row in result["engines"]] == ["prefix, 384 tokens"]
    header = cache.header(next(tmp_path.glob("*.engine")))
    assert header["identity"]["weights"] != "inputs"


@pytest.mark.parametrize(("options", "says"), [
    (("--target", "sm90"), "no target sm90"),
    (("--target", "sm110"), "Jetson Thor"),
    (("--target", "sm99"), "unknown target"),
    (("--target", "sm89", "--parts", "vision,suffix"), "unknown part"),
    (("--target", "sm89", "--prompts", "long"), "prompt lengths are numbers"),
    (("--target", "sm89", "--prompts", "0"), "prompt lengths are numbers from 1"),
    (("--target", "sm89", "--prompts", "64,"), "prompt lengths are numbers from 1"),
    (("--target", "sm89", "--parts", ","), "unknown part of a policy"),
    (("--target", "sm89", "--views", "0"), "views per observation"),
    (("--target", "sm89", "--views=-1"), "views per observation"),
    (("--target", "sm89", "--module", "tensorrt"), "TensorRT is installed"),
])  # fmt: skip
def test_refusals_are_one_message_and_exit_code_2(rtx, vivace, checkpoint, tmp_path, options, says):
    code, result, text = vivace("build", checkpoint, "--engines", tmp_path, *options)
    assert (code, result) == (2, None)
    assert says in " ".join(text.split())
    assert "Traceback" not in text


def test_options_as_text():
    assert tensorrt_options("") == TensorRTConfig()
    chosen = tensorrt_options("weights=baked, fused=true,module=tensorrt")
    assert chosen == TensorRTConfig(weights="baked", fused=True, module="tensorrt")
    for text, says in (
        ("weights=paged", "baked, inputs"),
        ("wieghts=baked", "module, base, weights"),
        ("fused", "true"),
    ):
        with pytest.raises(ConfigError, match=says):
            tensorrt_options(text)


def test_int8_for_a_target_without_fp8(rtx, vivace, checkpoint, recorded, tmp_path):
    """Calibrate, build for an RTX 30, and simulate the same plan on this CPU: one table says INT8 in both."""
    plan = recorded / "int8.json"
    options = ("--data", recorded, "--preset", "int8-full", "--steps", 2, "-o", plan)
    code, document, _ = vivace("calibrate", checkpoint, *options)
    assert code == 0
    assert any("--percentile 99.99" in remark for remark in document["remarks"])
    options = ("--target", "sm86", "--parts", "prefix", "--prompts", 64, "--engines", tmp_path)
    code, built, _ = vivace("build", checkpoint, "--precision", plan, *options)
    assert code == 0
    code, checked, _ = vivace("check", checkpoint, "--precision", plan, "--observations", 1, "--steps", 2)
    assert code == 0, checked
    for result in (built, checked):
        eight = {row["layer"] for row in result["coverage"] if row["precision"] == "int8"}
        assert {f"prefix.layers.0.{name}" for name in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")} <= eight
        assert not any(row["fallback"] for row in result["coverage"])
        assert not any(row["precision"] == "e4m3" for row in result["coverage"])


def test_fp8_for_a_target_without_fp8(rtx, vivace, checkpoint, plan, tmp_path):
    code, _, text = vivace("build", checkpoint, "--target", "sm86", "--precision", plan, "--engines", tmp_path)
    assert code == 2
    assert "sm86 (RTX 30) has no FP8" in " ".join(text.split())
    assert not list(tmp_path.glob("*.engine")), "vision was built before the plan was looked at"


@pytest.mark.parametrize("weights", ["inputs", "baked"])
def test_input_scales_that_no_engine_holds(rtx, vivace, checkpoint, recorded, tmp_path, weights):
    plan = tmp_path / "rows.json"
    options = ("--data", recorded, "--preset", "fp8-mlp", "--input-scale", "row", "--steps", 2, "-o", plan)
    assert vivace("calibrate", checkpoint, *options)[0] == 0
    options = ("--target", "sm120", "--weights", weights, "--base", "fp16", "--engines", tmp_path)
    code, _, text = vivace("build", checkpoint, "--precision", plan, *options)
    assert code == 2
    assert "one static input scale per tensor; got fp8-mlp+row with row" in " ".join(text.split())
    assert not list(tmp_path.glob("*.engine"))


def test_a_narrow_base_of_a_float32_model_is_refused(rtx, vivace, checkpoint, tmp_path):
    options = ("--target", "sm89", "--parts", "step", "--base", "fp16", "--engines", tmp_path)
    code, _, text = vivace("build", checkpoint, "--precision", "float32", *options)
    assert code == 2
    assert "--precision bfloat16" in " ".join(text.split())
    assert vivace("build", checkpoint, "--precision", "bfloat16", "--prompts", "8", *options)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_current_gpu_where_there_is_none(rtx, vivace, checkpoint):
    code, _, text = vivace("build", checkpoint)
    assert code == 2
    assert "--target sm89,sm120" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("verb", ["check", "serve", "bench"])
def test_the_backend_where_it_cannot_run(rtx, vivace, checkpoint, verb):
    which = ("--engines", "tensorrt") if verb == "bench" else ("--backend", "tensorrt")
    which += ("--tensorrt", "weights=baked")
    code, result, text = vivace(verb, checkpoint, *which)
    assert (code, result) == (2, None)
    assert "need an NVIDIA GPU, not cpu" in " ".join(text.split())
    assert "Traceback" not in text


@pytest.fixture
def hopper(monkeypatch):
    """As torch sees an H100. Nothing may be loaded for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("verb", ["check", "serve", "bench"])
def test_a_gpu_that_the_module_does_not_support(rtx, vivace, checkpoint, hopper, monkeypatch, verb):
    """One sentence, exit code 2, and no weight was read for it."""
    from vivace.runtime import policy

    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    which = ("--engines", "tensorrt") if verb == "bench" else ("--backend", "tensorrt")
    code, result, text = vivace(
        verb, checkpoint, *which, "--device", "cuda", "--tensorrt", "module=tensorrt_rtx"
    )  # fmt: skip
    assert (code, result) == (2, None)
    assert "TensorRT-RTX has no target sm90 (H100, H200)" in " ".join(text.split())
    assert "Traceback" not in text


def test_build_for_a_gpu_that_the_module_does_not_support(rtx, vivace, checkpoint, hopper, tmp_path):
    code, result, text = vivace("build", checkpoint, "--module", "tensorrt_rtx", "--engines", tmp_path)
    assert (code, result) == (2, None)
    assert "TensorRT-RTX has no target sm90 (H100, H200)" in " ".join(text.split())
    assert not list(tmp_path.iterdir())
