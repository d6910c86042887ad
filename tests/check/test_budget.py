"""Target-rate analysis on the founding report's own split, and on results of bench."""

import math

import pytest

from vivace.check import bench, results
from vivace.check.budget import budget, read_run
from vivace.check.gpus import find_gpu
from vivace.errors import ConfigError

FOUNDING = {
    "kind": "stages",
    "source": "founding report",
    "gpu": "thor",
    "precision": "bfloat16",
    "total_ms": 83.5,
    "stages_ms": {"vision": 17.2, "prefix": 47.4, "denoise": 10.1, "other": 8.8},
    "setting": {"kind": "pi05", "views": 3, "prompt_tokens": 200, "horizon": 50, "steps": 1},
}


def stages(answer):
    return {stage.stage: stage for stage in answer.stages}


def test_founding_report_to_20_hz():
    answer = budget(read_run(FOUNDING), target_hz=20)
    assert answer.budget_ms == 50
    assert answer.rate_hz == pytest.approx(11.976, abs=1e-3)
    assert answer.must_shrink_ms == pytest.approx(33.5)
    assert answer.factor == pytest.approx(1.67)
    rows = stages(answer)
    assert {name: round(row.share, 3) for name, row in rows.items()} == {
        "vision": 0.206, "prefix": 0.568, "denoise": 0.121, "other": 0.105,
    }  # fmt: skip
    assert rows["prefix"].alone_ms == pytest.approx(47.4 - 33.5)
    assert rows["prefix"].alone_factor == pytest.approx(47.4 / 13.9)
    for name in ("vision", "denoise", "other"):
        assert rows[name].alone_ms is None, "removing it entirely would not be enough"
    assert sum(row.evenly_ms for row in rows.values()) == pytest.approx(50)
    assert answer.verdict == "reachable by roofline"
    assert answer.floor_ms == pytest.approx(3.04 + 14.51 + 2.35, abs=0.02)
    assert answer.basis.startswith("measured")
    assert any("partly derived" in note for note in answer.notes)


def test_met_and_below_the_floor():
    met = budget(read_run(FOUNDING), target_hz=10)
    assert (met.verdict, met.must_shrink_ms) == ("met", 0)
    assert all(row.alone_ms == row.ms == row.evenly_ms for row in met.stages)
    assert budget(read_run(FOUNDING), target_hz=60).verdict == "below the floor"


def test_without_a_setting_there_is_no_roofline_and_no_guess():
    bare = {"kind": "stages", "stages_ms": {"vision": 10, "prefix": 20, "denoise": 30}}
    answer = budget(read_run(bare), target_hz=20)
    assert answer.verdict == "unknown"
    assert answer.total_ms == 60
    assert stages(answer)["other"].ms == 0
    assert any("not in the table" in note for note in answer.notes)
    named = budget(read_run({**bare, "gpu": "h100"}), target_hz=20)
    assert any("no roofline" in note for note in named.notes)


def test_another_gpu_is_a_model_and_says_so():
    run = read_run(FOUNDING)
    answer = budget(run, target_hz=20, gpu=find_gpu("h100"))
    assert answer.basis.startswith("a model, not a measurement")
    rows = stages(answer)
    assert rows["other"].ms == 8.8, "no roofline describes host work"
    own = {row.stage: row for row in budget(run, target_hz=20).stages}
    for name in ("vision", "prefix", "denoise"):  # the same efficiency against another floor
        assert rows[name].ms / rows[name].floor_ms == pytest.approx(own[name].ms / own[name].floor_ms)
    same = budget(run, target_hz=20, gpu=find_gpu("thor"))
    assert same.basis.startswith("measured")
    assert same.total_ms == 83.5


def test_another_precision_scales_too():
    run = read_run(FOUNDING)
    fp8 = stages(budget(run, target_hz=20, gpu=find_gpu("thor"), precision="fp8"))
    assert fp8["prefix"].ms == pytest.approx(47.4 / 2, rel=1e-3)


def test_a_machine_that_is_not_in_the_table_gives_floors_without_a_prediction():
    answer = budget(read_run({**FOUNDING, "gpu": None}), target_hz=20, gpu=find_gpu("h100"))
    assert answer.total_ms == 83.5
    assert "nothing was measured" in answer.basis


def test_the_robots_own_numbers_name_the_target():
    answer = budget(read_run(FOUNDING), control_hz=50, execution_horizon=5)
    assert answer.target_hz == 10
    assert "inference delay: 5 control ticks at 50 Hz" in answer.notes  # ceil(83.5 ms * 50 Hz)
    late = budget(read_run(FOUNDING), control_hz=50, execution_horizon=46)
    assert any("too short" in note for note in late.notes)
    for bad in ({}, {"target_hz": 0}, {"target_hz": -1}, {"target_hz": math.nan}, {"control_hz": 50}):
        with pytest.raises(ConfigError, match="target"):
            budget(read_run(FOUNDING), **bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages_ms": {"vision": -1}}, "vision"),
        ({"stages_ms": {"vision": "fast"}}, "vision"),
        ({"total_ms": 100}, "add up"),
        ({"gpu": "abacus"}, "unknown GPU"),
    ],
)
def test_files_that_contradict_themselves(change, message):
    with pytest.raises(ConfigError, match=message):
        read_run({**FOUNDING, **change})
    with pytest.raises(ConfigError, match="no stage times"):
        read_run({"kind": "check"})


def bench_document(**engines):
    rows = {}
    for name, ms in engines.items():
        times = bench.EngineTimes(
            name,
            0,
            0,
            True,
            total_ms=[ms] * 3,
            stages_ms={"vision": [ms / 4] * 3, "prefix": [ms / 2] * 3, "denoise": [ms / 8] * 3},
        )
        rows[name] = {"total": bench.summary(times.total_ms), "split": bench.split(times), "precision": "bfloat16"}
    setting = {**FOUNDING["setting"], "steps": 10, "device": "cuda"}
    return results.result(
        "bench", {"engines": rows, "setting": setting}, environment={"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    )


def test_reads_the_fastest_or_the_named_engine_of_a_bench_result():
    document = bench_document(slow=80.0, fast=40.0)
    run = read_run(document)
    assert run.total_ms == 40
    assert run.stages_ms == pytest.approx({"vision": 10, "prefix": 20, "denoise": 5, "other": 5})
    assert run.gpu == find_gpu("h100")
    assert read_run(document, engine="slow").total_ms == 80
    with pytest.raises(ConfigError, match=r"fast.*slow"):
        read_run(document, engine="faster")


def test_a_run_on_the_cpu_is_not_taken_for_one_on_the_gpu_of_the_machine():
    document = bench_document(a=80.0)
    document["setting"]["device"] = "cpu"
    assert read_run(document).gpu is None
