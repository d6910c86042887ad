"""`vivace calibrate`, and its plans in `check` and `bench`: exit codes, what is refused, what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vivace.check.observations import synthetic
from vivace.check.report_sections import render
from vivace.cli import calibrate as verb
from vivace.precision import quantize
from vivace.precision.sensitivity import Score
from vivace.runtime.policy import load_policy

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "calibrating.md"
STEPS = ("--steps", "2")


def save(folder, requests):
    folder.mkdir()
    for index, request in enumerate(requests):
        np.savez(folder / f"{index:03}.npz", **request)
    return folder


@pytest.fixture(scope="module")
def requests(checkpoint):
    return synthetic(load_policy(checkpoint).io, 5)


@pytest.fixture
def recorded(tmp_path, requests):
    return save(tmp_path / "kitchen", requests)


@pytest.fixture
def plan_file(vivace, checkpoint, recorded, tmp_path):
    path = tmp_path / "plan.json"
    assert vivace("calibrate", checkpoint, "--data", recorded, "--preset", "fp8-all", "-o", path, *STEPS)[0] == 0
    return path


def test_a_plan_of_recorded_observations(vivace, checkpoint, recorded, tmp_path):
    path = tmp_path / "made" / "plan.json"
    code, document, text = vivace("calibrate", checkpoint, "--data", recorded, "-o", path, *STEPS)
    assert code == 0
    plan = json.loads(path.read_text())
    assert plan["data"] == document["observations"]["source"] == "recorded: kitchen, 5 observations"
    assert plan["data_hash"] == document["observations"]["hash"]
    assert plan["checkpoint_hash"] == document["engine"]["checkpoint_hash"]
    assert plan["method"] == "amax"
    assert {row["layer"] for row in document["layers"]} == set(plan["amax"])
    assert all(row["saturated"] == 0 and row["values"] > 0 for row in document["layers"])
    assert document["steps"]["layer"].startswith("expert.layers.")
    assert len(document["steps"]["amax"]) == 2
    assert "5 observations are few" in " ".join(document["remarks"])
    assert "prefix.layers.0.mlp.gate_up" in text
    assert "vivace check" in text


def test_a_percentile_saturates_what_it_says(vivace, checkpoint, recorded):
    code, document, _ = vivace("calibrate", checkpoint, "--data", recorded, "--percentile", "99", *STEPS)
    assert code == 0
    assert document["plan"]["method"] == "percentile 99"
    for row in document["layers"]:
        assert 0 < row["saturated"] <= 0.01 * row["values"]
        assert row["chosen"] < row["amax"]


def blank(request):
    return {k: np.zeros_like(v) if np.ndim(v) == 3 else v for k, v in request.items()}


def noise(request):
    g = np.random.default_rng(0)
    return {k: g.integers(0, 256, v.shape, dtype=np.uint8) if np.ndim(v) == 3 else v for k, v in request.items()}


@pytest.mark.parametrize(("change", "said"), [(blank, "constant"), (noise, "noise")], ids=["zeros", "noise"])
def test_stand_ins_are_refused_unless_they_are_called_synthetic(vivace, checkpoint, tmp_path, requests, change, said):
    folder, path = save(tmp_path / "fake", [change(request) for request in requests]), tmp_path / "plan.json"
    code, document, text = vivace("calibrate", checkpoint, "--data", folder, "-o", path, *STEPS)
    assert (code, document) == (2, None)
    assert said in text
    assert not path.exists()
    code, document, _ = vivace("calibrate", checkpoint, "--data", folder, "--synthetic", "-o", path, *STEPS)
    assert code == 0
    assert json.loads(path.read_text())["data"].startswith("synthetic: fake")
    assert "mean nothing for a robot" in " ".join(document["remarks"])


def test_one_observation_many_times_is_refused(vivace, checkpoint, tmp_path, requests):
    folder = save(tmp_path / "frozen", [requests[0]] * 3)
    code, _, text = vivace("calibrate", checkpoint, "--data", folder, *STEPS)
    assert code == 2
    assert "all 3 observations are the same" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "needs one source"),
        (("--observations", "3"), "made up"),
        (("--observations", "3", "--synthetic", "--data", "x"), "needs one source"),
        (("--observations", "3", "--synthetic", "--preset", "fp8"), "unknown precision plan"),
        (("--observations", "3", "--synthetic", "--preset", "bf16"), "nothing to calibrate"),
        (
            ("--observations", "3", "--synthetic", "--preset", "fp8-mlp", "--input-scale", "step"),
            "no rule of 'fp8-mlp'",
        ),
        (
            ("--observations", "3", "--synthetic", "--preset", "int8-mlp", "--input-scale", "row"),
            "no rule of 'int8-mlp'",
        ),
        (("--observations", "3", "--synthetic", "--percentile", "max"), "no share of values"),
        (("--observations", "3", "--synthetic", "--percentile", "101"), "no share of values"),
        (("--observations", "1", "--synthetic", "--max-action-error", "1"), "at least 2"),
        (("--data", "nowhere"), "no recorded observations"),
    ],
)
def test_bad_use_exits_2(vivace, checkpoint, options, said):
    code, document, text = vivace("calibrate", checkpoint, *options, *STEPS)
    assert (code, document) == (2, None)
    assert said in " ".join(text.split())


@pytest.mark.parametrize("scale", ["row", "step"])
def test_finer_input_scales(vivace, checkpoint, recorded, tmp_path, scale):
    path, base = tmp_path / "plan.json", ("--data", recorded, "--preset", "fp8-expert", "--input-scale", scale)
    code, document, _ = vivace("calibrate", checkpoint, *base, "-o", path, *STEPS)
    assert code == 0
    plan = json.loads(path.read_text())
    assert [rule["input_scale"] for rule in plan["rules"]] == [scale]
    assert {len(steps) for steps in plan.get("step_amax", {}).values()} == ({2} if scale == "step" else set())
    assert document["steps"]["scale"] == {"row": "one per token", "step": "one per step"}[scale]
    assert {row["input_scale"] for row in document["layers"]} == {scale}
    assert f"this plan has one per {scale}" in " ".join(document["remarks"])
    again = tmp_path / "again.json"
    options = ("--data", recorded, "--preset", path, "--input-scale", "tensor", "-o", again, *STEPS)
    assert vivace("calibrate", checkpoint, *options)[0] == 0
    assert "input_scale" not in again.read_text()
    code, document, _ = check(vivace, checkpoint, path)
    assert code == 0
    assert {row["precision"] for row in document["coverage"] if row["layer"].startswith("expert.layers.")} >= {"e4m3"}
    code, _, text = vivace("check", checkpoint, "--precision", path, "--observations", "2", "--steps", "3")
    assert (code == 2) == (scale == "step")
    assert ("another number of denoise steps" in " ".join(text.split())) == (scale == "step")


def test_sensitivity_ranks_every_layer_alone(vivace, checkpoint, recorded):
    code, document, text = vivace("calibrate", checkpoint, "--data", recorded, "--sensitivity", *STEPS)
    assert code == 0
    rows = document["sensitivity"]
    assert {row["layer"] for row in rows} == set(document["plan"]["amax"])
    errors = [row["score"]["rel_l2"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-6, "a layer in E4M3 changed nothing: it was not quantised"
    assert errors[0] < 0.1
    assert "each layer alone" in text
    section = render(document)
    assert "layer alone in E4M3" in section
    assert rows[0]["layer"] in section
    assert document["plan"]["hash"] in section


def test_a_bound_gives_a_mixed_plan_that_meets_it(vivace, checkpoint, recorded, tmp_path):
    path, base = tmp_path / "mixed.json", ("--data", recorded, "--preset", "fp8-all", *STEPS)
    _, every, _ = vivace("calibrate", checkpoint, *base, "--max-action-error", "0.5")
    assert every["mixed"]["left_out"] == []
    assert every["mixed"]["flops_share"] == 1.0
    _, _, refused = vivace("calibrate", checkpoint, *base, "--max-action-error", "1e-7")
    plain, whole = (
        float(re.search(r"got (\S+) without any FP8", refused).group(1)),
        every["mixed"]["chosen_with"]["rel_l2"],
    )
    assert plain < whole
    bound = (plain + whole) / 2  # between bfloat16's own error and that of everything in FP8
    code, document, text = vivace("calibrate", checkpoint, *base, "--max-action-error", bound, "-o", path)
    assert document, text
    mixed = document["mixed"]
    assert mixed["chosen_with"]["rel_l2"] <= bound
    assert document["passed"] == (code == 0) == (mixed["held_out"]["rel_l2"] <= bound) == path.exists()
    names = [rule["pattern"] for rule in document["plan"]["rules"]]
    assert mixed["left_out"]
    assert {row["layer"] for row in mixed["left_out"]}.isdisjoint(names)
    assert len(names) + len(mixed["left_out"]) == 21
    assert mixed["held_out_observations"] == 1
    assert "left out: " in " ".join(text.split())


def test_a_bound_below_bfloat16_itself_exits_2(vivace, checkpoint, recorded):
    code, _, text = vivace("calibrate", checkpoint, "--data", recorded, "--max-action-error", "1e-7", *STEPS)
    assert code == 2
    assert "without any FP8" in " ".join(text.split())


def test_a_plan_that_misses_its_bound_on_held_out_data_exits_1_and_is_not_written(
    vivace, checkpoint, recorded, tmp_path, monkeypatch
):
    path, real = tmp_path / "plan.json", verb._mixed
    monkeypatch.setattr(verb, "_mixed", lambda *a: (real(*a)[0], Score(rel_l2=0.6, cosine=0.9)))
    code, document, _ = vivace(
        "calibrate", checkpoint, "--data", recorded, "--max-action-error", "0.5", "-o", path, *STEPS
    )
    assert code == 1
    assert not document["passed"]
    assert not path.exists()
    assert "misses its bound" in " ".join(document["remarks"])


# --- the plan in use --------------------------------------------------------------------------------------------------


def check(vivace, checkpoint, plan_file):
    return vivace("check", checkpoint, "--precision", plan_file, "--observations", "2", *STEPS)


def test_check_passes_a_right_plan_and_shows_its_coverage(vivace, checkpoint, plan_file):
    code, document, text = check(vivace, checkpoint, plan_file)
    assert code == 0
    assert document["engine"]["plan"]["name"] == "fp8-all"
    assert document["engine"]["precision"].startswith("fp8-all (plan ")
    small = {row["layer"] for row in document["coverage"] if row["precision"] == "e4m3"}
    assert small == set(json.loads(plan_file.read_text())["amax"])
    assert document["summary"]["worst"]["k"][0]["rel_l2"] > 1e-2, "E4M3 must differ from float32 more than bfloat16"
    assert "what ran" in text


def test_check_fails_a_layer_that_was_silently_skipped(vivace, checkpoint, plan_file, monkeypatch):
    real, skipped = quantize.linears, "prefix.layers.0.mlp.down"
    monkeypatch.setattr(quantize, "linears", lambda model: [row for row in real(model) if row[2].name != skipped])
    code, document, text = check(vivace, checkpoint, plan_file)
    assert code == 1
    assert all(mark["passed"] for mark in document["marks"]), "accuracy alone would not have told"
    assert [row["layer"] for row in document["coverage"] if row["fallback"]] == [skipped]
    assert "fell back: prefix.layers.0.mlp.down" in text


def test_check_fails_saturated_ranges(vivace, checkpoint, plan_file):
    document = json.loads(plan_file.read_text())
    document["amax"] = {name: value / 50 for name, value in document["amax"].items()}
    plan_file.write_text(json.dumps(document))
    code, found, _ = check(vivace, checkpoint, plan_file)
    assert code == 1
    assert not any(row["fallback"] for row in found["coverage"])


def test_check_fails_a_wrong_scale(vivace, checkpoint, plan_file, monkeypatch):
    real = quantize.quantise_weight
    monkeypatch.setattr(quantize, "quantise_weight", lambda *a, **o: (real(*a, **o)[0], 1.3 * real(*a, **o)[1]))
    assert check(vivace, checkpoint, plan_file)[0] == 1


def test_check_refuses_a_stale_plan_and_a_preset(vivace, checkpoint, plan_file):
    document = json.loads(plan_file.read_text())
    document["checkpoint_hash"] = "0" * 16
    plan_file.write_text(json.dumps(document))
    code, found, text = check(vivace, checkpoint, plan_file)
    assert (code, found) == (2, None)
    assert "another checkpoint" in text
    code, found, text = check(vivace, checkpoint, "fp8-mlp")
    assert (code, found) == (2, None)
    assert "vivace calibrate" in " ".join(text.split())


def test_bench_takes_a_plan_beside_bfloat16(vivace, checkpoint, plan_file):
    engines = f"eager:bfloat16,eager:{plan_file}"
    code, document, text = vivace("bench", checkpoint, "--engines", engines, "--samples", "3", *STEPS)
    assert code == 0
    plain, small = document["engines"].values()
    assert {row["precision"] for row in plain["coverage"]} <= {"float32", "bfloat16"}
    assert "e4m3" in {row["precision"] for row in small["coverage"]}
    assert small["precision"].startswith("fp8-all (plan ")
    assert small["output"]["rel_l2"] > plain["output"]["rel_l2"]
    assert "coverage of eager:bfloat16" in text


def test_the_commands_of_the_guide_run(vivace, checkpoint, requests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_checkpoint").symlink_to(checkpoint)
    save(tmp_path / "recorded", requests)
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("vivace ")]
    assert len(commands) >= 4
    for command in commands:
        extra = ("--samples", "3") if command.startswith("vivace bench") else ()
        code, document, text = vivace(*command.split()[1:], *extra, *STEPS)
        assert code == 0, f"{command}: {text}"
        assert document["passed"]


@pytest.mark.parametrize(("bad", "said"), [
    (("--observations=-3", "--synthetic"), "--observations cannot be used; got -3"),
    (("--observations", "3", "--synthetic", "--sensitivity", "--sensitivity-observations", "0"), "--sensitivity-observ"),
    (("--observations", "3", "--synthetic", "--max-action-error", "0"), "--max-action-error cannot be used"),
    (("--data", "nowhere"), "no recorded observations"),
    (("--observations", "3"), "made up"),
])  # fmt: skip
def test_bad_arguments_are_found_before_anything_is_loaded(vivace, checkpoint, monkeypatch, bad, said):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("loaded first"))
    code, document, text = vivace("calibrate", checkpoint, *bad, *STEPS)
    assert (code, document) == (2, None)
    assert said in " ".join(text.split())


def test_a_negative_seed_exits_2(vivace, checkpoint):
    code, _, text = vivace("calibrate", checkpoint, "--observations", "2", "--synthetic", "--seed=-1", *STEPS)
    assert code == 2
    assert "--seed cannot be used" in " ".join(text.split())


def test_a_dark_camera_is_named_and_can_be_left_out(vivace, checkpoint, tmp_path, requests, monkeypatch):
    dark = [key for key, value in requests[0].items() if np.ndim(value) == 3][-1]
    folder = save(tmp_path / "dark", [{**one, dark: np.zeros_like(one[dark])} for one in requests])
    code, _, text = vivace("calibrate", checkpoint, "--data", folder, *STEPS)
    said = " ".join(text.split())
    assert code == 2
    assert f"camera {dark}: the image is constant in every observation" in said
    assert "--without KEY" in said
    seen = []
    monkeypatch.setattr(verb, "_measure", lambda args, base, given, *rest: seen.extend(given) or exit())
    vivace("calibrate", checkpoint, "--data", folder, "--without", dark, *STEPS)
    assert len(seen) == 5
    assert all(dark not in request for request in seen)
    code, _, text = vivace("calibrate", checkpoint, "--data", folder, "--without", "prompt", *STEPS)
    assert code == 2
    assert "names no camera" in " ".join(text.split())
