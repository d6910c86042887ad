"""The waterfall: the rows of a result in the order of the techniques, latency and error together; table and plot of it."""

import math
from pathlib import Path

import pytest

from vivace.check import results
from vivace.check.report import build
from vivace.check.waterfall import STEPS, alike, merged, settings, waterfall
from vivace.errors import ConfigError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MS = {
    "eager": 200.0, "compiled graph": 20.0, "cuda_graph bf16": 14.0, "cuda_graph fp8-mlp": 12.5,
    "cuda_graph fp8-full": 12.0, "cuda_graph fp8-prefix+vision": 11.0, "cuda_graph fp8-all": 10.0,
}  # fmt: skip


def row(engine, ms, setting="3,200,50", boundary="B0"):
    latency = {"p50_ms": ms, "p95_ms": ms * 1.01, "p99_ms": ms * 1.02, "max_ms": ms * 1.1, "min_ms": ms, "mean_ms": ms,
               "samples": 1000}  # fmt: skip
    target = {"what": "B0 p50, ms", "got": ms, "rule": "at most", "must": 11.0, "stretch": 8.5, "must_met": ms <= 11,
              "stretch_met": False}  # fmt: skip
    rates = {"vision": {"tflop": 0.6, "gb": 0.8, "fp8_share": 0.0, "tflop_s": 400.0, "gb_s": 500.0, "floor_ms": 0.8,
                        "of_floor": 0.5}}  # fmt: skip
    return {"setting": setting, "engine": engine, "precision": "x", "boundary": boundary, "calls": 1000, "latency": latency,
            "targets": [target], "stages_ms": {"vision": 1.6}, "rates": rates,
            "bit_identical": {"same": 1000, "of": 1000}}  # fmt: skip


def score(engine, error, setting="3,200,50"):
    four = {"cosine_mean": 1 - error, "cosine_worst": 1 - 2 * error, "rel_l2": error, "rel_l2_worst": 2 * error}
    plain = {"cosine_mean": 0.9999, "cosine_worst": 0.9998, "rel_l2": 0.0105, "rel_l2_worst": 0.02}
    return {"setting": setting, "engine": engine, "precision": "x", "observations": 64, "noise_draws": 3, **four,
            "plain_bfloat16": plain, "targets": []}  # fmt: skip


def document(engines=tuple(MS), **changes):
    body = {
        "preset": "hopper", "setup": {"weights": "random"}, "rows": [row(engine, MS[engine]) for engine in engines],
        "accuracy": [score(engine, 0.01 * i) for i, engine in enumerate(engines) if engine != "eager"],
        "proof": [{"setting": "3,200,50", "engine": "cuda_graph bf16", "passed": True}],
        "memory": [{"engine": "cuda_graph bf16", "ratio": 1.05, "targets": []}], "missed": ["something <b>slow</b>"],
        "not_run": [{"phase": "soak", "what": "all", "why": "no time"}], "passed": False, **changes,
    }  # fmt: skip
    return results.result("hopper", body)


def test_steps_are_in_order_whatever_the_order_of_rows():
    made = document(tuple(reversed(MS)))
    steps = waterfall(made, "3,200,50")
    assert [step.engine for step in steps] == [engine for engine, _ in STEPS] == list(MS)
    assert [step.p50_ms for step in steps] == list(MS.values())
    assert steps[1].of_above == pytest.approx(10.0)
    assert steps[-1].of_above == pytest.approx(1.1)
    assert steps[-1].of_first == pytest.approx(20.0)
    assert steps[0].of_above == steps[0].of_first == 1.0


def test_errors_are_those_of_the_engine_and_eagers_those_of_plain_bfloat16():
    steps = {step.engine: step for step in waterfall(document(), "3,200,50")}
    assert steps["eager"].rel_l2 == 0.0105
    assert steps["cuda_graph fp8-all"].rel_l2 == pytest.approx(0.06)
    assert steps["cuda_graph fp8-all"].cosine_worst == pytest.approx(0.88)


def test_what_was_not_measured_has_no_row_and_no_error():
    made = document(("cuda_graph bf16", "cuda_graph fp8-all"), accuracy=[])
    steps = waterfall(made, "3,200,50")
    assert [step.engine for step in steps] == ["cuda_graph bf16", "cuda_graph fp8-all"]
    assert all(math.isnan(step.rel_l2) for step in steps)
    assert waterfall(made, "1,2,3") == ()


def test_other_settings_and_boundaries_do_not_mix():
    made = document()
    made["rows"] += [row("eager", 1.0, boundary="B2"), row("cuda_graph bf16", 9.0, setting="1,48,50")]
    assert settings(made) == ["3,200,50", "1,48,50"]
    assert waterfall(made, "3,200,50")[0].p50_ms == 200.0
    assert [step.p50_ms for step in waterfall(made, "1,48,50")] == [9.0]


def test_the_report_shows_table_plot_marks_and_what_was_missed():
    page = build([("hopper.json", document())])
    assert "<h2>Full size on one GPU</h2>" in page
    assert "Waterfall, (3,200,50)" in page
    for _, adds in STEPS:
        assert adds.replace("+", "+") in page
    assert page.count("<svg") == 1
    assert "200.0 ms, error 0.01" in page, "the plot names latency and error"
    assert "something &lt;b&gt;slow" in page
    assert "soak, all: no time" in page
    assert 'pill bad">fail' in page
    assert "1000 / 1000" in page


def test_the_report_shows_coverage_and_what_was_left_to_torch():
    part = {"part": "prefix mlp.down", "operation": "linear_residual_norm", "layers": 18, "kernel": "triton",
            "precision": "e4m3", "flops_share": 0.25, "bytes_share": 0.5, "fallback": "it <b>fell"}  # fmt: skip
    mark = {
        "what": "layers that did not run as the plan says",
        "got": 1,
        "must": 0,
        "must_met": False,
        "stretch_met": None,
    }
    row = {"setting": "3,200,50", "engine": "cuda_graph fp8-all", "parts": [part], "by_torch": ["projector linear"],
           "targets": [mark]}  # fmt: skip
    page = build([("hopper.json", document(coverage=[row]))])
    assert "Coverage: what ran where" in page
    assert "coverage, (3,200,50) cuda_graph fp8-all" in page
    assert "25.00 %" in page
    assert "By plain torch: projector linear." in page
    assert "it &lt;b&gt;fell" in page
    assert 'bad">layers that did not run as the plan says 1' in page
    assert "Coverage" not in build([("hopper.json", document())])


def test_the_report_shows_what_a_proof_missed():
    mark = {"what": "replays over poisoned memory", "got": 2, "must": 3, "must_met": False, "stretch_met": None}
    proof = {"setting": "3,200,50", "engine": "cuda_graph bf16", "passed": False, "targets": [mark]}
    page = build([("hopper.json", document(proof=[proof]))])
    assert 'bad">replays over poisoned memory 2' in page


def test_replays_of_one_stage_are_no_row_of_the_waterfall():
    made = document()
    made["rows"] += [row("cuda_graph bf16", 1.0, boundary="B0 reuse")]
    assert waterfall(made, "3,200,50")[2].p50_ms == 14.0


def test_an_incomplete_result_is_an_error():
    with pytest.raises(ConfigError, match="incomplete"):
        build([("h.json", {"schema": 1, "kind": "hopper"})])


def test_a_row_below_what_was_not_measured_says_that_it_adds_both():
    made = document(("eager", "cuda_graph bf16", "cuda_graph fp8-all"))
    first, own, every = waterfall(made, "3,200,50")
    assert first.adds == "plain PyTorch, bfloat16"
    assert own.adds.startswith("+ one CUDA graph + own kernels")
    assert every.adds == (
        "+ MLPs of the prefix in FP8 + QKV and O of the prefix in FP8 + SigLIP in FP8 + action expert in FP8"
    )
    (alone,) = waterfall(document(("cuda_graph bf16",)), "3,200,50")
    assert alone.adds.startswith("bfloat16 + one CUDA graph + own kernels")
    assert "compile" not in own.adds + alone.adds


GPU = {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}


def test_rivals_and_ours_from_two_files_stand_in_one_waterfall():
    ours = document(("cuda_graph bf16", "cuda_graph fp8-all"), environment=GPU)
    rivals = document(("eager", "compiled graph"), environment=GPU)
    rivals["rows"].append(row("cuda_graph bf16", 99.0))
    steps = waterfall(merged([ours, rivals]), "3,200,50")
    assert [step.engine for step in steps] == ["eager", "compiled graph", "cuda_graph bf16", "cuda_graph fp8-all"]
    assert [step.p50_ms for step in steps] == [200.0, 20.0, 14.0, 10.0], "of two rows the first file's counts"
    page = build([("ours.json", ours), ("rivals.json", rivals)])
    assert page.count("Waterfall, (3,200,50)") == 1
    assert "also have rows of rivals.json" in page
    assert "stand in the waterfalls of ours.json" in page
    assert "+ torch.compile and one CUDA graph" in page


@pytest.mark.parametrize(
    "changes", [{"environment": {"gpus": [{"name": "NVIDIA H200"}]}}, {"setup": {"weights": "mine"}}]
)
def test_other_gpus_and_weights_have_a_waterfall_of_their_own(changes):
    ours, other = document(environment=GPU), document(**{"environment": GPU, **changes})
    page = build([("ours.json", ours), ("other.json", other)])
    assert page.count("Waterfall, (3,200,50)") == 2
    assert "stand in the waterfalls" not in page


def test_the_committed_results_of_one_gpu_make_one_waterfall_a_setting():
    files = [RESULTS / f"hopper-{name}h100-2026-11-25.json" for name in ("", "rivals-", "soak-")]
    documents = [results.read_result(file) for file in files]
    assert len({alike(one) for one in documents}) == 1
    page = build([(file.name, one) for file, one in zip(files, documents, strict=True)])
    for name in settings(documents[0]):
        assert page.count(f"Waterfall, ({name})") == 1
        engines = [step.engine for step in waterfall(merged(documents), name)]
        assert engines[:3] == ["eager", "compiled graph", "cuda_graph bf16"]


def test_the_report_shows_ceilings_beside_the_rates():
    ceilings = {"bf16_tflops": 775.0, "fp8_tflops": 1425.0, "copy_gb_s": 3005.0, "measured": True}
    made = document(ceilings=ceilings, published={"bf16_tflops": 989.0, "fp8_tflops": 1979.0, "copy_gb_s": 3350})
    page = build([("hopper.json", made)])
    assert "large work (measured): 775 TFLOP/s in bfloat16, 1425 in FP8, 3005 GB/s" in page
    assert "the datasheet (published): 989 TFLOP/s" in page
    assert page.count(">ceiling<") == 2
    made["rows"][0]["rates"]["vision"]["fp8_share"] = 1.0
    assert ">1425<" in build([("hopper.json", made)])
