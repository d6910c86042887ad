"""examples/demo.py: which steps run beside which, and what happens when one fails. The demo itself takes minutes."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "demo.py"
RESULTS = "closed-loop", "simulate", "check", "check-fp8", "calibrate", "bench", "budget", "inspect", "doctor"


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def step(demo, tmp_path):
    """A step that runs Python code in `tmp_path`."""

    def made(title, code, **options):
        return demo.Step(
            title, [sys.executable, "-c", f"import os, sys, time; os.chdir({str(tmp_path)!r}); {code}"], **options
        )

    return made


WAIT = "[time.sleep(0.02) for _ in range(1500) if not os.path.exists({!r})]; assert os.path.exists({!r})"


def test_two_steps_run_at_once_and_each_waits_for_what_it_needs(demo, step, tmp_path):
    meet = [
        step(me, f"open({me!r}, 'w').close(); {WAIT.format(other, other)}") for me, other in (("a", "b"), ("b", "a"))
    ]
    last = step("last", "assert os.path.exists('left by then')", needs=("a", "b"))
    early = step("a", meet[0].command[-1].partition("; ")[2], then=lambda: (tmp_path / "left by then").touch())
    demo.Runner().side_by_side([last, early, meet[1]], at_a_time=2)


def test_what_steps_say_is_not_mixed_and_their_json_is_saved(demo, step, tmp_path, capfd):
    lines = (
        "[(print(sys.argv[0], {!r}, file=sys.stderr, flush=True), time.sleep(0.02)) for _ in range(10)]; print('[1]')"
    )
    both = [step(name, lines.format(name), save=tmp_path / f"{name}.json") for name in ("one", "two")]
    demo.Runner().side_by_side(both, at_a_time=2)
    said = [line.split()[-1] for line in capfd.readouterr().err.splitlines() if line.startswith("-c ")]
    assert said in (["one"] * 10 + ["two"] * 10, ["two"] * 10 + ["one"] * 10)
    assert [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")] == [[1], [1]]


def test_a_step_that_fails_ends_the_one_beside_it_and_the_demo(demo, step, tmp_path):
    start = time.monotonic()
    slow = step("slow", "open('begun', 'w').close(); time.sleep(60)")
    bad = step("bad", f"{WAIT.format('begun', 'begun')}; sys.exit(3)")
    never = step("never", "open('never', 'w').close()")
    with pytest.raises(SystemExit, match="bad: exit code 3"):
        demo.Runner().side_by_side([slow, bad, never], at_a_time=2)
    assert time.monotonic() - start < 45
    assert not (tmp_path / "never").exists()
    with pytest.raises(SystemExit, match="bad: exit code 3"):
        demo.Runner().alone(bad)


def test_threads_of_a_step(demo, step, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.ENVIRONMENT, "OMP_NUM_THREADS", "7")
    code = "print(os.environ['OMP_NUM_THREADS'])"
    for threads, seen in ((1, "1"), (None, "7")):
        demo.Runner().alone(step("threads", code, save=tmp_path / "said", threads=threads))
        assert (tmp_path / "said").read_text().strip() == seen


@pytest.mark.parametrize("slow", [None, "no compiler"])
def test_the_steps_fit_together(demo, tmp_path, slow):
    files = {name: tmp_path / f"{name}.json" for name in RESULTS}
    together, alone = demo.steps(tmp_path, files, episodes=4, slow=slow)
    titles = [one.title for one in together]
    for one in together:
        assert set(one.needs) < set(titles)
    written = [str(one.save) for one in (*together, *alone) if one.save] + [w for one in together for w in one.command]
    assert all(str(path) in written for path in files.values()), "every result of the report is made"
    makes = {str(tmp_path / "demos"): "record", str(tmp_path / "plan.json"): "calibrate"}
    for path, verb in makes.items():
        maker = next(one for one in together if path in one.command and verb in one.command)
        readers = [one for one in together if path in one.command and one is not maker]
        assert all(maker.title in one.needs for one in readers)
    check, bench = (next(one for one in (*together, *alone) if one.save == files[name]) for name in ("check", "bench"))
    assert ("compiled" in check.command) == ("eager,compiled" in bench.command) == (slow is None)
    assert check.threads == bench.threads is None, "programs compiled for other threads would be compiled again"
    assert bench not in together, "speed is measured alone"
