"""The README says what the committed result says, and its commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from vivace.check.targets import SIZES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def readme_table():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speed_table_is_that_of_the_result():
    made = readme_table()
    assert made.with_table(README, made.text()) == README, "run: python benchmarks/readme_table.py --write"


def test_a_result_of_the_preset_makes_the_table_by_changing_one_constant():
    """Every figure of a table line is the result's own; what was not measured is a dash and never a number."""
    p50 = {"compiled graph": 22.7, "cuda_graph bf16": 14.35, "cuda_graph fp8-all": 10.71}
    rows = [
        {"setting": "3,200,50", "engine": engine, "boundary": "B0", "latency": {"p50_ms": ms, "p99_ms": ms + 0.1}}
        for engine, ms in p50.items()
    ]
    rows.append(
        {
            "setting": "3,200,50",
            "engine": "cuda_graph bf16",
            "boundary": "B2",
            "latency": {"p50_ms": 15.2, "p99_ms": 16},
        }
    )
    rows.append(
        {
            "setting": "2,0,63",
            "engine": "cuda_graph bf16",
            "boundary": "B0",
            "latency": {"p50_ms": 11.4, "p99_ms": 11.5},
        }
    )
    accuracy = [
        {"setting": "3,200,50", "engine": "cuda_graph bf16", "rel_l2": 0.0065, "plain_bfloat16": {"rel_l2": 0.0105}},
        {"setting": "3,200,50", "engine": "cuda_graph fp8-all", "cosine_mean": 0.99912, "cosine_worst": 0.99601},
    ]
    result = {"rows": rows, "accuracy": accuracy}
    _, _, first, second = readme_table().table(result).splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == [
        "(3, 200, 50)", "22.70", "14.35 / 14.45", "0.0065 / 0.0105", "10.71 / 10.81", "0.99912 / 0.99601",
        "15.20 / 16.00, -",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.strip("|").split("|")] == [
        "(2, 0, 63)", "-", "11.40 / 11.50", "-", "-", "-", "-, -",
    ]  # fmt: skip


def test_whole_calls_of_rivals_stand_in_the_table_once_a_result_has_them():
    """In the order of the heading; results from before have them at B0 alone, and keep their heading."""
    made, rows = readme_table(), []
    p50 = {"cuda_graph bf16": 13.0, "cuda_graph fp8-all": 9.0, "compiled graph": 20.0, "eager": 185.0}
    for engine, ms in p50.items():
        for boundary, more in (("B0", 0.0), ("B2", 1.0)):
            latency = {"p50_ms": ms + more, "p99_ms": ms + more + 0.5}
            rows.append({"setting": "3,200,50", "engine": engine, "boundary": boundary, "latency": latency})
    head, _, line = made.table({"rows": rows, "accuracy": []}).splitlines()
    assert head.endswith("`policy.infer` p50 / p99, plain PyTorch, torch.compile, bfloat16, fp8-all |")
    assert line.endswith("| 186.00 / 186.50, 21.00 / 21.50, 14.00 / 14.50, 10.00 / 10.50 |")
    older = [row for row in rows if row["boundary"] == "B0" or "cuda_graph" in row["engine"]]
    head, _, line = made.table({"rows": older, "accuracy": []}).splitlines()
    assert head.endswith("`policy.infer` p50 / p99, bfloat16, fp8-all |")
    assert line.endswith("| 14.00 / 14.50, 10.00 / 10.50 |")


def test_the_first_of_two_results_counts(tmp_path, monkeypatch):
    made = readme_table()
    for name, ms in (("main.json", 13.5), ("rivals.json", 99.0)):
        row = {"setting": "s", "engine": "cuda_graph bf16", "boundary": "B0", "latency": {"p50_ms": ms, "p99_ms": ms}}
        other = {**row, "engine": "compiled graph", "latency": {"p50_ms": 22.0, "p99_ms": 22.0}}
        rows = [row] if name == "main.json" else [row, other]
        (tmp_path / name).write_text(json.dumps({"rows": rows, "accuracy": []}))
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    line = made.table(made.merged(("main.json", "rivals.json"))).splitlines()[2]
    assert "22.00 | 13.50 / 13.50" in line
    assert "99" not in line


def test_every_verb_of_the_readme_exists():
    from vivace.cli.main import VERBS

    named = set(re.findall(r"`vivace ([a-z-]+)", README)) | set(
        re.findall(r"^    vivace ([a-z-]+)", README, re.MULTILINE)
    )
    assert named
    assert named <= set(VERBS)


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_changelog_has_numerics():
    assert "### Numerics" in (ROOT / "CHANGELOG.md").read_text()


def test_agreement_claims_are_those_of_the_committed_replay():
    """Each "within X" of the first table is at least what was measured, and at most twice that."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "golden-cpu-2026-11-24.json").read_text())["rows"]
    final = [row for row in rows if row["stage"] == "actions"]
    families = {
        "LeRobot 0.4.4": lambda r: r["case"].startswith("lerobot") and r["note"] == "max abs / scale",
        "openpi PyTorch": lambda r: r["case"].startswith("openpi_pytorch") and r["note"] == "max abs / scale",
        "openpi JAX": lambda r: r["case"].startswith("openpi_jax") and r["note"] == "max abs / scale",
        "openpi / LeRobot bfloat16": lambda r: "bf16" in r["case"] and r["note"] == "relative L2",
    }
    assert all(row["passed"] for row in rows)
    for family, belongs in families.items():
        measured = max(row["error"] for row in final if belongs(row))
        line = next(line for line in README.splitlines() if line.startswith(f"| {family}"))
        claimed = float(re.search(r"actions within ([0-9.e-]+)", line).group(1))
        assert measured <= claimed <= 2 * measured, f"{family}: README says {claimed}, measured {measured:.2e}"


def test_figures_in_the_text_are_the_results_own():
    """Beside the table: tail, start, memory, host path, and the marks that were missed."""
    results = ROOT / "benchmarks" / "results"

    def load(name):
        return json.loads((results / name).read_text(encoding="utf-8"))

    def rows_of(document):
        return {(r["setting"], r["engine"], r["boundary"]): r["latency"]["p50_ms"] for r in document["rows"]}

    newer, before = load("hopper-every-mark-h200-2026-11-30.json"), load("hopper-client-h200-2026-11-30.json")
    soaks = [one["soak"][0]["latency"] for one in (load("hopper-soak-h100-2026-11-25.json"), newer)]
    older = rows_of(load("hopper-h100-2026-11-25.json"))
    now = rows_of(newer)
    small = [
        [rows["3,200,50", f"cuda_graph {plan}", "B0"] for rows in (older, now)] for plan in ("fp8-mlp", "fp8-full")
    ]

    def added(rows, upper="B2", lower="B0", views=(1, 2, 3)):
        more = [
            ms - rows[setting, engine, lower]
            for (setting, engine, boundary), ms in rows.items()
            if boundary == upper and int(setting[0]) in views
        ]
        return min(more), max(more)

    (least, most), (before_least, before_most) = added(now), added(older)

    def served(document, boundary, *, settings=4):
        more = [row["added_ms"] for row in document["rows"] if row["boundary"] == boundary]
        assert len(more) == 2 * settings, "two engines"
        return f"{min(more):.2f} to {max(more):.2f}"

    whole = {row["engine"]: row for row in load("hopper-rivals-every-boundary-h200-2026-11-30.json")["rows"]
             if row["boundary"] == "B2"}  # fmt: skip
    beside = whole["compiled graph"]["ours_in_the_same_rounds"]
    shown = {
        row["boundary"]: row["latency"]["p50_ms"]
        for row in newer["rows"] if (row["setting"], row["engine"]) == ("3,200,50", "cuda_graph fp8-all")
    }  # fmt: skip
    start = {row["caches"]: row for row in newer["start"]}
    warm, cold = start["warm"], start["cold"]
    one_bucket = {row["precision"]: row["ratio"] for row in newer["memory"]}["bf16"]
    check = load("check-full-size-fp8-all-h200-2026-11-30.json")
    marks = {mark["what"]: mark for mark in check["marks"]}
    failed = [mark for mark in check["marks"] if not mark["passed"]]
    for plan in ("bf16", "fp8-mlp", "fp8-full"):
        assert load(f"check-full-size-{plan}-h200-2026-11-30.json")["passed"]
    for plan in ("fp8-mlp", "fp8-full"):
        assert len(load(f"check-full-size-{plan}-h200-2026-11-30.json")["marks"]) == 136
    assert "masks are read" in newer["setup"]["graphs"]
    assert newer["passed"]
    assert newer["missed"] == []
    assert [row for row in newer["not_run"] if not row["what"].endswith("B3 openpi")] == []
    assert {row["latency"]["samples"] for row in whole.values()} == {1000}
    assert most <= 1.0
    assert newer["soak"][0]["checks"] == {"same": 200, "of": 200, "output_poisoned": True}
    assert all("look, infer" in row["poisoned"]["ways"] and row["passed"] for row in newer["proof"])
    rivals = load("hopper-rivals-five-h200-2026-11-30.json")
    timed = [row for row in rivals["rows"] if row["engine"] == "compiled graph"]
    assert [row["setting"] for row in timed] == [*SIZES]
    assert [row["calls"] for row in timed] == [1000] * 5
    assert rivals["passed"]
    ratios = {
        plan: [row["ours_in_the_same_rounds"][f"cuda_graph {plan}"]["ratio"] for row in timed]
        for plan in ("fp8-all", "bf16")
    }
    public = load("hopper-realtime-vla-h200-2026-11-30.json")
    beside_public = {row["setting"]: row for row in public["rows"]}
    assert list(beside_public) == [*SIZES]
    assert all(row["calls"] == 1000 and row["targets"][0]["must_met"] for row in public["rows"])
    public_ratios = {
        plan: [row["ours_in_the_same_rounds"][f"cuda_graph {plan}"]["ratio"] for row in public["rows"]]
        for plan in ("fp8-all", "bf16")
    }
    public_errors = [row["rel_l2"] for row in public["accuracy"]]
    files = load("start-from-files-h200-2026-11-30.json")
    assert files["passed"]
    from_files = [row["first_action_s"] for row in files["rows"]]
    assert [row["caches"] for row in files["rows"]] == ["cold", "warm", "warm", "warm"]
    other = load("check-full-size-fp8-prefix-and-vision-h200-2026-11-30.json")
    assert len(other["marks"]) == 136
    stretch = {
        row["setting"]
        for row in newer["rows"] for mark in row["targets"] if mark["stretch_met"] and mark["stretch"] is not None
    }  # fmt: skip
    assert stretch == {"1,48,50"}
    assert len(failed) == 2
    assert all(mark["what"].startswith("K layer") and mark["wanted"] == 0.99 for mark in failed)
    assert [mark["what"] for mark in other["marks"] if not mark["passed"]] == [mark["what"] for mark in failed]
    wanted = (
        f"fp8-mlp ({small[0][0]:.2f} on the H100, {small[0][1]:.2f} on the H200) and "
        f"fp8-full ({small[1][0]:.2f}, {small[1][1]:.2f}) miss or just meet",
        f"{soaks[0]['samples']:,} replays in a row",
        f"p99 is {soaks[0]['p99_ms'] / soaks[0]['p50_ms']:.3f} times p50 on the H100 and "
        f"{soaks[1]['p99_ms'] / soaks[1]['p50_ms']:.3f} on the H200",
        f"first action {warm['first_action_s']:.0f} s after its start and has every prompt bucket ready after "
        f"{warm['every_bucket_s']:.0f} s, {cold['first_action_s']:.0f} and {cold['every_bucket_s']:.0f} s without",
        f"takes {served(newer, 'B3')} ms more than `policy.infer` through vivace's own client (mark 1.5)",
        f"it took {served(before, 'B3')}, and through openpi's {served(before, 'B3 openpi')} (",
        f"20 calls each, {served(load('hopper-int8-first-tiles-h200-2026-11-30.json'), 'B3', settings=2)} (",
        f"plain PyTorch about {whole['eager']['latency']['p50_ms']:.0f} ms "
        f"(p99 {whole['eager']['latency']['p99_ms']:.0f}), torch.compile in a graph "
        f"{whole['compiled graph']['latency']['p50_ms']:.1f}, bfloat16 {beside['cuda_graph bf16']['p50_ms']:.1f}, "
        f"fp8-all {beside['cuda_graph fp8-all']['p50_ms']:.1f} (",
        f"actions {shown['B2']:.0f} ms after it asks in the same process, {shown['B3']:.1f} ms over a websocket",
        f"fp8-all is {min(ratios['fp8-all']):.1f} to {max(ratios['fp8-all']):.1f} times faster and "
        f"bfloat16 {min(ratios['bf16']):.1f} to {max(ratios['bf16']):.1f};",
        ", ".join(f"{row['latency']['p50_ms']:.2f}" for row in public["rows"])
        + f" ms in the five settings, where fp8-all is {min(public_ratios['fp8-all']):.2f} to "
        f"{max(public_ratios['fp8-all']):.2f} times faster and bfloat16 {min(public_ratios['bf16']):.2f} to "
        f"{max(public_ratios['bf16']):.2f} (",
        f"float32 is {min(public_errors):.4f} to {max(public_errors):.4f} relative L2",
        f"a checkpoint of {files['weights_bytes_in_files'] / 1e9:.1f} GB",
        f"answers {min(from_files[1:]):.0f} to {max(from_files[1:]):.0f} s after its start, {from_files[0]:.0f} s without",
        f"`policy.infer` takes {least:.2f} to {most:.2f} ms more than B0",
        f"H100, with an older host path: {before_least:.1f} to {before_most:.1f};",
        f"fp8-all reserves {warm['ratio']:.2f} times weights and cache with all prompt buckets, "
        f"bfloat16 {one_bucket:.2f} with one",
        f"actions (cosine {marks['actions, mean cosine']['got']:.5f}, mark 0.999)",
        f"two of 18 layers ({min(mark['got'] for mark in failed):.4f}, mark 0.99)",
    )
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [claim for claim in wanted if claim not in text] == []
