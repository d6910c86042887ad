"""`vivace bench` on a real tiny checkpoint."""

import pytest
import torch
import tyro

from vivace.backends import on_device
from vivace.check import results
from vivace.check.hopper_run import Options
from vivace.cli import bench as verb

FAST = ("--samples", "6", "--warmup-seconds", "1", "--steps", "2")


def test_two_engines_side_by_side(vivace, checkpoint, tmp_path):
    out = tmp_path / "b.json"
    code, document, text = vivace(
        "bench", checkpoint, "--engines", "eager,eager:bfloat16", *FAST, "--target-hz", "0.01", "-o", out
    )
    assert code == 0
    assert document == results.read_result(out)
    assert set(document["engines"]) == {"eager", "eager:bfloat16"}
    for row in document["engines"].values():
        assert row["total"]["samples"] == len(row["samples"]["total_ms"]) == 6
        total = row["total"]
        assert 0 < total["min_ms"] <= total["p50_ms"] <= total["p95_ms"] <= total["p99_ms"] <= total["max_ms"]
        parts = row["split"]["mean_ms"]
        assert list(parts) == ["vision", "prefix", "denoise", "other"]
        assert sum(parts.values()) == pytest.approx(total["mean_ms"], rel=1e-6)
        assert {"vision", "prefix", "denoise", "preprocess", "postprocess"} <= set(row["stages"])
        assert {"preprocess", "postprocess", "unexplained"} <= set(row["split"]["other_ms"])
        assert row["split"]["adds_up"]
        assert row["output"]["cosine"] > 0.995
        assert row["engine"]["backend"] == "eager"
        assert row["device"] is None
    assert document["engines"]["eager:bfloat16"]["precision"] == "bfloat16"
    (speedup,) = document["speedups"]
    assert (speedup["engine"], speedup["baseline"]) == ("eager:bfloat16", "eager")
    assert speedup["low"] <= speedup["ratio"] <= speedup["high"]
    assert document["boundary"]["name"] == "B2"
    assert document["setting"]["device"] == "cpu"
    assert document["state_before"]["time_s"] < document["state_after"]["time_s"]
    assert document["environment"]["cpu"]["model"]
    assert document["budgets"]["eager"]["verdict"] == "met"
    assert "eager:bfloat16 is" in text
    assert document["passed"]
    assert "eager: other is preprocess" in text
    assert "unexplained host time" in text


def test_its_result_feeds_budget_and_report(vivace, checkpoint, tmp_path):
    out = tmp_path / "b.json"
    assert vivace("bench", checkpoint, *FAST, "-o", out)[0] == 0
    code, document, _ = vivace("budget", out, "--target-hz", "1000")
    assert code == 0
    assert document["budget"]["factor"] > 1
    code, document, _ = vivace("report", out, "-o", tmp_path / "r.html")
    assert code == 0
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_an_engine_with_other_actions_exits_1_and_has_no_row(vivace, checkpoint, monkeypatch):
    real = verb.load

    def load(path, args, *, backend, precision):
        policy = real(path, args, backend=backend, precision=precision)
        if precision == "bfloat16":
            inner = policy.backend.denoise
            policy.backend.denoise = lambda *a, **k: -inner(*a, **k)
        return policy

    monkeypatch.setattr(verb, "load", load)
    code, document, text = vivace("bench", checkpoint, "--engines", "eager,eager:bfloat16", *FAST)
    assert code == 1
    assert document["passed"] is False
    assert "engines" not in document
    assert document["output"]["eager:bfloat16"]["cosine"] < 0
    assert "was not timed" in " ".join(text.split())


def test_overlapping_spans_exit_1(vivace, checkpoint, monkeypatch):
    """The report and the exit code say the same."""
    real = verb.load

    def load(path, args, *, backend, precision):
        policy = real(path, args, backend=backend, precision=precision)
        infer = policy.infer

        def overlapping(request):
            chunk = infer(request)
            chunk.milliseconds["vision"] += chunk.milliseconds["total"]
            return chunk

        policy.infer = overlapping
        return policy

    monkeypatch.setattr(verb, "load", load)
    code, document, text = vivace("bench", checkpoint, *FAST, "--target-hz", "20")
    assert code == 1
    assert document["passed"] is False
    assert document["engines"]["eager"]["split"]["adds_up"] is False
    assert "eager: the spans overlap" in text
    assert "budgets" not in document, "a budget of stages that do not add up says nothing"


@pytest.mark.parametrize(
    "engines", [("eager", "eager:bfloat16"), ("eager,", "eager:bfloat16"), ("eager,eager:bfloat16",)]
)
def test_engines_by_spaces_or_commas(engines):
    args = tyro.cli(verb.Args, args=["ck", "--engines", *engines, "--samples", "7"])
    assert verb._names(args.engines) == ["eager", "eager:bfloat16"]
    assert args.samples == 7


@pytest.mark.parametrize("engines", ["", "eager,eager", "warp", "eager:fp3"])
def test_bad_engines_exit_2(vivace, checkpoint, engines):
    code, document, _ = vivace("bench", checkpoint, "--engines", engines, *FAST)
    assert (code, document) == (2, None)


def test_the_preset_runs_the_full_size_benchmark_with_its_own_options(vivace, tmp_path, monkeypatch):
    from vivace.check import hopper

    seen = {}

    def run(options, *, phases, tell):
        seen.update(vars(options), phases=phases)
        return {"schema": 1, "kind": "hopper", "passed": False, "missed": ["x"]}

    monkeypatch.setattr(hopper, "run", run)
    out = tmp_path / "h.json"
    code, document, _ = vivace(
        "bench", "--preset", "hopper", "-o", out, "--full.settings", "1,48,50", "2,0,63", "--full.plans", "bf16", "fp8-all",
        "--full.phases", "rows", "--full.calls", "7", "--full.host-calls", "1000",
    )  # fmt: skip
    assert code == 1, "a must was missed"
    assert document["kind"] == "hopper"
    assert [size.name for size in seen["sizes"]] == ["1,48,50", "2,0,63"]
    assert (seen["plans"], seen["phases"], seen["calls"], seen["out"]) == (("bf16", "fp8-all"), ["rows"], 7, out)
    assert seen["host_calls"] == 1000


@pytest.mark.parametrize(
    "arguments", [["--preset", "hopper"], ["a_checkpoint", "--preset", "hopper", "-o", "x.json"], []]
)
def test_a_preset_takes_a_file_and_no_checkpoint(vivace, arguments):
    code, _, text = vivace("bench", *arguments)
    assert code == 2
    assert "preset" in text


@pytest.mark.parametrize(("bad", "said"), [
    (("--target-hz", "0"), "--target-hz cannot be used; got 0.0; wanted more than 0"),
    (("--target-hz", "nan"), "--target-hz"),
    (("--warmup-seconds=-1",), "--warmup-seconds cannot be used"),
    (("--samples", "0"), "--samples cannot be used"),
    (("--engines", "eager,eager:none.json"), "none.json"),
    (("--observations", "none"), "no recorded observations"),
    (("--seed=-1",), "--seed cannot be used"),
    (("--horizon", "3"), "got horizon 3; wanted 6"),
])  # fmt: skip
def test_bad_arguments_are_found_before_anything_is_loaded(vivace, checkpoint, monkeypatch, bad, said):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("loaded first"))
    code, document, text = vivace("bench", checkpoint, *bad)
    assert (code, document) == (2, None)
    assert said in " ".join(text.split())


def test_the_timers_events_are_on_the_engines_device(monkeypatch, checkpoint, vivace, devices):
    on, current, seen = *devices, []
    measure = verb.bench.measure
    monkeypatch.setattr(on_device, "on", on)
    monkeypatch.setattr(verb.bench, "measure", lambda *a, **k: (seen.extend(current), measure(*a, **k))[1])
    code, _, _ = vivace("bench", checkpoint, "--engines", "eager", *FAST)
    assert code == 0
    assert seen == [torch.device("cpu")]


def test_both_commands_of_the_full_size_benchmark_have_the_same_defaults():
    for option in ("calls", "host_calls", "seconds"):
        assert getattr(verb.PresetArgs(), option) == getattr(Options, option), option
