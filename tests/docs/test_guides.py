"""The figures of the guides about the bundled policy are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vivace.checkpoints import bundled
from vivace.config import EngineConfig
from vivace.runtime.policy import load_policy
from vivace.sim.statistics import fisher

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SIMULATION = " ".join((ROOT / "docs/guides/simulation.md").read_text(encoding="utf-8").split())
TRAINING = " ".join((ROOT / "docs/guides/training.md").read_text(encoding="utf-8").split())


def load(name, date="2026-11-30"):
    return json.loads((RESULTS / f"conveyor-small-{name}-{date}.json").read_text(encoding="utf-8"))


def share(arm):
    return f"{100 * arm['successes'] / arm['n']:.0f}"


def counts(name):
    return [f"{arm['successes']}/{arm['n']}" for arm in load(name)["arms"]]


def test_every_result_of_the_guides_is_of_the_policy_that_comes_with_vivace():
    """Two policies were trained on one day; files of the other one say so in their names."""
    names = (
        "rates",
        "events",
        "belts",
        "delay",
        "100ms",
        "steps",
        "steps-bimodal",
        "steps-bimodal-24",
        "plans-h200",
        "plans-cpu",
        "plans-fp8-cpu",
        "real-clock-h200",
        "unseen",
        "unseen-100ms",
        "unseen-160ms",
        "unseen-belts",
        "unseen-events",
        "untold",
    )
    hashes = {arm["engine"]["checkpoint_hash"] for name in names for arm in load(name)["arms"]}
    other = {arm["engine"]["checkpoint_hash"] for arm in load("rates", "2026-11-30-earlier-policy")["arms"]}
    model = load_policy("conveyor-small", config=EngineConfig(device="cpu", precision="float32"))
    assert hashes == {model.engine.checkpoint_hash}
    assert hashes.isdisjoint(other)


def test_the_rates_that_the_policy_brings_are_those_of_the_results():
    stored = json.loads((bundled.find(Path("conveyor-small")) / "simulation.json").read_text(encoding="utf-8"))["rates"]
    arms = [arm for name in ("rates", "events", "belts") for arm in load(name)["arms"]]
    wanted = {(arm["arm"]["task"], arm["arm"]["belt"], arm["successes"], arm["n"]) for arm in arms}
    assert {(rate["task"], rate["belt"], rate["successes"], rate["n"]) for rate in stored} == wanted
    assert len(stored) == len(arms) == 7


def test_rates_hold_on_seeds_that_nothing_was_chosen_on():
    found = [load(name) for name in ("unseen", "unseen-belts", "unseen-events")]
    for unseen in found:
        assert unseen["seeds"] == {"first": 80000, "n": 200}
        assert {row["name"]: row["status"] for row in unseen["controls"]} == dict.fromkeys(
            ("stored rate", "blanked", "mask", "delay"), "passed"
        )
    arms = [arm for unseen in found for arm in unseen["arms"]]
    where = {(arm["arm"]["task"], arm["arm"]["belt"]): (arm["successes"], arm["n"]) for arm in arms}
    assert where.pop(("perturb", None)) == (199, 200)
    assert list(where.values()) == [(200, 200)] * 6
    assert "200/200 again but for `perturb`, 199/200" in SIMULATION
    assert (
        f"wrong object {sum(arm['wrong_object'] for arm in arms)} of {sum(arm['n'] for arm in arms)}, and" in SIMULATION
    )
    looks = [arm["inference_ms"]["p50"] for arm in found[0]["arms"]]
    assert f"{min(looks):.0f} to {max(looks):.0f} ms" in SIMULATION


def test_aligned_beats_naive_on_unseen_seeds_too():
    unseen = load("unseen-100ms")
    aligned, naive = unseen["arms"]
    assert (aligned["arm"]["mode"], naive["arm"]["mode"], unseen["seeds"]["first"]) == ("aligned", "naive", 80000)
    paired = next(one["result"] for one in unseen["comparisons"] if one["what"] == "mode")
    said = f"{aligned['successes']} and {naive['successes']} (p = {paired['mcnemar_p']:.0e}, "
    assert said in SIMULATION
    assert {row["name"]: row["status"] for row in unseen["controls"]} == {
        "stored rate": "void", "blanked": "passed", "mask": "passed", "delay": "passed",
    }  # fmt: skip


def test_what_the_plans_were_compared_at_holds_on_unseen_seeds():
    unseen, (float32,) = load("unseen-160ms"), load("plans-cpu")["arms"]
    (arm,) = unseen["arms"]
    ours, before = (arm["successes"], arm["n"]), (float32["successes"], float32["n"])
    assert f"{ours[0]} of {ours[1]} " in SIMULATION
    assert f"(Fisher p = {fisher(ours, before):.2f})" in SIMULATION
    assert [row["status"] for row in unseen["controls"]] == ["void", "passed", "passed", "passed"]


def test_rates_without_delay():
    arms = [arm for name in ("rates", "events", "belts") for arm in load(name)["arms"]]
    assert [(arm["successes"], arm["n"]) for arm in arms] == [(200, 200)] * 7
    assert sum(arm["wrong_object"] for arm in arms) == 0
    assert "200/200 each" in SIMULATION
    assert f"wrong object 0 of {sum(arm['n'] for arm in arms)}" in SIMULATION


def test_table_of_delays():
    arms = load("delay")["arms"]
    assert {arm["n"] for arm in arms} == {50}
    for belt in ("slow", "middle", "fast"):
        for mode in ("pause", "naive", "aligned"):
            row = [arm for arm in arms if (arm["arm"]["belt"], arm["arm"]["mode"]) == (belt, mode)]
            cells = " | ".join(share(arm) for arm in sorted(row, key=lambda arm: int(arm["arm"]["delay"]["name"][:-3])))
            at_100 = next(arm for arm in row if arm["arm"]["delay"]["name"] == "100 ms")
            median = f"{at_100['time_to_success_s']['median']:.2f} s" if at_100["successes"] else "-"
            assert f"| {belt} | {mode} | {cells} | {median} |" in SIMULATION


@pytest.mark.parametrize(
    ("name", "row"),
    [("steps", "conveyor"), ("steps-bimodal", "bimodal"), ("steps-bimodal-24", "bimodal, whole chunks")],
)
def test_table_of_denoise_steps(name, row):
    assert [arm["arm"]["steps"] for arm in load(name)["arms"]] == [1, 2, 3, 5, 10]
    assert f"| {row} | {' | '.join(counts(name))} |" in SIMULATION


def test_aligned_against_naive_and_the_real_clock():
    aligned, naive = (arm["successes"] for arm in load("100ms")["arms"])
    assert f"aligned {aligned}, naive {naive} (McNemar" in SIMULATION
    a, a_late, b, b_late = counts("real-clock-h200")
    assert (
        f"aligned {a}, naive {b}; with 80 ms on top, so 100 ms in ticks, aligned {a_late}, naive {b_late}" in SIMULATION
    )


def test_plans():
    cpu = load("plans-cpu")
    assert f"float32 on a CPU {cpu['arms'][0]['successes']} (" in SIMULATION
    assert [f"{row['noninferiority_p']:.1g}" for row in cpu["against_h200"].values()] == ["0.003", "0.0009", "0.01"]
    assert "(p = 0.003, 0.0009, 0.010)" in SIMULATION
    low, mlp, every = (arm["successes"] for arm in load("plans-h200")["arms"])
    assert f"bfloat16 {low}, fp8-mlp {mlp}, fp8-all {every}" in SIMULATION
    simulated = load("plans-fp8-cpu")
    low, mlp, every = (arm["successes"] for arm in simulated["arms"])
    assert f"plain PyTorch: bfloat16 {low}, fp8-mlp {mlp}, fp8-all {every}" in SIMULATION
    assert all(row["noninferior"] and row["n"] == 500 for row in simulated["against_float32"].values())
    shown = ", ".join(f"{row['noninferiority_p']:.1g}" for row in simulated["against_float32"].values())
    assert f"none is worse by 5 points (p = {shown})" in SIMULATION


def test_table_of_the_expert():
    names = "conveyor-expert-2026-11-25.json", "conveyor-expert-fastest-2026-11-30.json"
    arms = [arm for name in names for arm in json.loads((RESULTS / name).read_text(encoding="utf-8"))["arms"]]
    cells = {}
    for arm in arms:
        mode = "aligned, told" if arm["arm"]["committed"] else arm["arm"]["mode"]
        cells[arm["arm"]["belt"], mode, arm["arm"]["delay"]["name"]] = share(arm)
    rows = sorted({key[:2] for key in cells})
    assert len(rows) == 15
    for belt, mode in rows:
        row = [cells.get((belt, mode, f"{ms} ms"), "") for ms in (0, 40, 80, 100, 120, 160, 200, 300)]
        line = " ".join(f"| {belt} | {mode} | {' | '.join(row)} |".split())
        assert line in SIMULATION, line


def test_told_against_untold():
    untold = load("untold")
    by = {arm["arm"]["delay"]["name"]: arm["successes"] for arm in untold["arms"]}
    pairs = untold["told_against_untold"]
    assert f"takes {by['100 ms']} of 500 at 100 ms and {by['160 ms']} at 160 ms" in SIMULATION
    assert not any(arm["arm"]["committed"] for arm in untold["arms"])
    told = {name: by[name] + row["gained"] - row["lost"] for name, row in pairs.items()}
    shown = [f"{abs(100 * row['difference']):.0f} points" for row in (pairs["100 ms"], pairs["160 ms"])]
    assert (
        f"told, {told['100 ms']} and {told['160 ms']} of the same seeds: {shown[0]} fewer (p = 0.005) and "
        in SIMULATION
    )
    assert f"{shown[1]} more (p = 0.15)" in SIMULATION
    assert [round(row["mcnemar_p"], 3) for row in pairs.values()] == [0.152, 0.005]
    assert untold["untold_against_naive"]["100 ms"]["lost"] == 0


def test_training_run():
    log = load("training-h200")["log"]
    last = {row["event"]: row for row in log}
    assert f"made the bundled policy in {last['exported']['t_s']:.0f} s" in TRAINING
    recorded, data = last["recorded"], last["data"]
    assert f"{recorded['seconds']:.0f} s for {recorded['episodes']:,} demonstrations" in TRAINING
    assert f"({recorded['kept']:,} succeeded, {data['examples']:,} examples)" in TRAINING
    corrected = [row for row in log if row["event"] == "corrected"]
    assert f"{sum(row['examples'] for row in corrected):,} examples" in TRAINING
    places = [("static", "task's own"), ("conveyor", "task's own"), ("conveyor", "middle"), ("conveyor", "fast"),
              ("bimodal", "task's own")]  # fmt: skip
    for row in corrected:
        found = {(one["task"], one["belt"]): f"{one['successes']}/{one['n']}" for one in row["rates"]}
        delay = f"{20 * row['delay_ticks']} ms" if row["delay_ticks"] else "0"
        cells = " | ".join(found.get(place, "") for place in places)
        assert f"| {row['step']:,} | {delay} | {' '.join(cells.split())} |" in TRAINING


def test_the_policy_before_it():
    late = {
        arm["arm"]["belt"]: arm["successes"]
        for arm in load("delay", "2026-11-30-earlier-policy")["arms"]
        if (arm["arm"]["mode"], arm["arm"]["delay"]["name"]) == ("aligned", "160 ms")
    }
    assert f"{late['slow']}, {late['middle']} and {late['fast']} of 40 on the three belts" in TRAINING


def test_lerobot_itself():
    """The table about LeRobot's own loader and actions, every row of it, and what the text says of all of them."""
    found = json.loads((RESULTS / "lerobot-itself-2026-11-30.json").read_text(encoding="utf-8"))
    cases = found["cases"]
    assert f"LeRobot {found['versions']['lerobot']} takes a folder" in TRAINING
    assert f"{len(cases)} folders" in TRAINING
    assert found["environment"]["python"].startswith("3.11")
    assert "five files" in found["changed_in_lerobot"]
    assert "It was run on Python 3.11" in TRAINING
    newer = found["outside_lerobots_bounds"]
    assert len(newer) == 6
    assert "Six packages were newer" in TRAINING
    for name in ("torch", "torchvision", "Pillow"):
        assert f"{name} {newer[name].split('+')[0].split(',')[0]}" in TRAINING
    assert all(case["all_keys_loaded"] and not case["missing"] and not case["unexpected"] for case in cases.values())
    assert all(case["equal_tensors"] == case["tensors"] > 0 for case in cases.values())

    def row(case):
        exact, rounded = cases[case], cases.get(f"{case}, bfloat16")
        assert exact["dtype"] == "float32"
        assert rounded is None or rounded["dtype"] == "bfloat16"
        last = f"{rounded['rel_l2']:.1e} |" if rounded else "|"
        return f"| {exact['tensors']} | {exact['max_abs']:.1e} of {exact['scale']:.1f} | {last}"

    names = [case for case in cases if not case.endswith("bfloat16")]
    begin = TRAINING.index("| folder | tensors |")
    table = TRAINING[begin : TRAINING.index("Three things to know", begin)]
    assert len(names) == 6
    at = 0
    for name in names:
        at = table.index(row(name), at + 1)
    engine = load_policy("conveyor-small", config=EngineConfig(device="cpu", precision="float32")).engine
    assert cases["conveyor-small"]["checkpoint_hash"] == engine.checkpoint_hash
