"""Physics and scoring of the conveyor: from a random draw to a placed scene, one control tick at a time.

Nothing here knows of images, instructions in English, or Gymnasium (conveyor.py). All randomness of an episode is drawn in
`draw`, from one generator and in a fixed order, so a seed means the same start for every task that shares the fields.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from . import scene
from .scene import BELT_Y_M, COLOURS, CONTROL_HZ, CUBE_HALF_M, REST_Z_M, SUBSTEPS
from .tasks import Range, Task

Vector = NDArray[np.float64]

COMMAND_M = 0.01
"""Action 1.0 moves the commanded hand position by this much in one tick: 0.5 m/s."""
WORKSPACE_LOW_M = np.array([-0.45, 0.40, 0.04])
WORKSPACE_HIGH_M = np.array([0.45, 0.90, 0.40])
POST_CEILING_M = 0.22
"""With a post (0.34 m high) the hand cannot rise above this: the way is left or right."""
PAST_THE_POST_S = 1.0
"""A cube on a running belt comes to the middle of the post when a hand has passed it: both ways stay equally long."""
LIFTED_Z_M = 0.12
HELD_TICKS = 10
BELT_END_M = 0.42
WELL_TOLERANCE_M = 0.004
HISTORY_TICKS = 5
"""The third view shows the front camera this many ticks ago: 100 ms."""
POINTING_DOWN = (1.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Draw:
    """Everything random about one episode. Metres, seconds; positions in world axes (x along the belt)."""

    hand_m: Vector
    belt_m_s: float
    cubes: tuple[str, ...]
    target: str
    cube_xy_m: Vector
    post_m: Vector
    well_m: Vector
    event_tick: int
    jumps_m: Vector
    blob_phase: Vector
    flicker_seed: int


@dataclass(frozen=True)
class Sight:
    """The true state, for experts and scores; a policy does not get it.

    tick        control ticks since reset
    hand_m      [3] of the gripper; the centre between the finger pads
    offset_m    [3] commanded minus measured hand position
    gap_m       distance of the finger pads: about 0.094 open, 0.042 on a cube, less when closed on nothing
    target_m    [3], centre of the cube that the instruction names now
    belt_m_s    speed of the belt along x
    post_m, well_m  [2] and [3], None where the task has none
    way         side of the post that the demonstrator has in mind, +1 or -1 along x; None: that on which the hand is
    """

    tick: int
    hand_m: Vector
    offset_m: Vector
    gap_m: float
    target_m: Vector
    belt_m_s: float
    post_m: Vector | None
    well_m: Vector | None
    way: float | None = None


@dataclass(frozen=True)
class Score:
    """What has happened up to a tick. `wrong_object`: another cube was lifted and held, or put into the well."""

    success: bool = False
    wrong_object: bool = False
    lost: bool = False
    collision: bool = False


class World:
    """One scene. `reset` places it, `step` advances one control tick (20 ms).

    belt_m_s  replaces the task's range of speeds
    """

    def __init__(self, task: Task, *, belt_m_s: Range | None = None) -> None:
        self.task = task
        self.belt_range = task.belt_m_s if belt_m_s is None else belt_m_s
        self.model = scene.load()
        self.data = mujoco.MjData(self.model)
        model = self.model
        self._hand = model.body("hand").id
        self._pads = model.body("rightpad").id, model.body("leftpad").id
        self._belt_q, self._belt_v = model.joint("belt").qposadr[0], model.joint("belt").dofadr[0]
        self._mocap = {name: model.body(name).mocapid[0] for name in ("mocap", "post", "slot", "blob0", "blob1")}
        self._post_geom = model.geom("post").id
        self.high_m = WORKSPACE_HIGH_M.copy()
        if task.post:
            self.high_m[2] = POST_CEILING_M
        self._arm_home = self._settled_arm()

    # --- placing ----------------------------------------------------------------------------------------------------

    def _settled_arm(self) -> Vector:
        """Joint positions with the hand at rest above the belt, cubes out of the way."""
        self._park()
        self._command(np.array([0.0, 0.6, 0.2]), grip=-1.0)
        mujoco.mj_step(self.model, self.data, 400)
        return np.array(self.data.qpos)

    def _park(self) -> None:
        for i, name in enumerate(COLOURS):
            self._put(name, np.array([1.5 + 0.2 * i, -1.5, -0.913 + CUBE_HALF_M]))
        for name in ("post", "slot", "blob0", "blob1"):
            self.data.mocap_pos[self._mocap[name]] = [0.0, 0.0, -2.0]

    def _put(self, cube: str, position_m: Vector, *, speed_m_s: float = 0.0) -> None:
        joint = self.model.joint(cube)
        q, v = joint.qposadr[0], joint.dofadr[0]
        self.data.qpos[q : q + 7] = [*position_m, 1.0, 0.0, 0.0, 0.0]
        self.data.qvel[v : v + 6] = [speed_m_s, 0.0, 0.0, 0.0, 0.0, 0.0]

    def _command(self, position_m: Vector, *, grip: float) -> None:
        hand = self._mocap["mocap"]
        self.data.mocap_pos[hand] = position_m
        self.data.mocap_quat[hand] = POINTING_DOWN
        self.data.ctrl[:] = [grip, -grip]

    def reset(self, rng: np.random.Generator, *, event: bool = True) -> None:
        """Draw and place an episode. `event` False: the twin in which nothing jumps, enters or is swapped (same draw)."""
        self.drawn = drawn = draw(self.task, self.belt_range, rng)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self._arm_home
        self._park()
        self._command(drawn.hand_m, grip=-1.0)
        mujoco.mj_step(self.model, self.data, 120)
        self.data.qpos[self._belt_q] = 0.0
        self.data.time = 0.0
        for cube, (x, y) in zip(drawn.cubes, drawn.cube_xy_m, strict=True):
            if self.task.event == "enter" and cube != drawn.target:
                continue  # parked until the event
            self._put(cube, np.array([x, y, REST_Z_M]), speed_m_s=drawn.belt_m_s)
        if self.task.post:
            self.data.mocap_pos[self._mocap["post"]] = drawn.post_m
        if self.task.goal == "insert":
            self.data.mocap_pos[self._mocap["slot"]] = drawn.well_m
        self.target = drawn.target
        self.tick = 0
        self.event_tick = drawn.event_tick if event and self.task.event != "none" else None
        self.score = Score()
        self._good_ticks, self._bad_ticks = 0, 0
        self._move_blobs()
        self.data.qvel[self._belt_v] = drawn.belt_m_s
        mujoco.mj_forward(self.model, self.data)
        self.past: deque[tuple[int, Vector, Vector]] = deque(maxlen=HISTORY_TICKS + 1)
        self._remember()

    # --- one tick ---------------------------------------------------------------------------------------------------

    def step(self, action: NDArray[np.floating]) -> None:
        """Advance 20 ms. action [4] in [-1, 1]: hand velocity (1 = 0.5 m/s) and grip (1 closes, -1 opens)."""
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        wanted = self.data.mocap_pos[self._mocap["mocap"]] + action[:3] * COMMAND_M
        self._command(np.clip(wanted, WORKSPACE_LOW_M, self.high_m), grip=float(action[3]))
        self.data.qvel[self._belt_v] = self.drawn.belt_m_s
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        self.tick += 1
        self._move_blobs()
        if self.tick == self.event_tick:
            self._happen()
        mujoco.mj_forward(self.model, self.data)
        self._remember()
        self._judge()

    def _happen(self) -> None:
        others = [cube for cube in self.drawn.cubes if cube != self.target]
        if self.task.event == "swap":
            self.target = others[0]
            return
        moved = [self.target] if self.task.event == "jump" else others
        # the second half lies twice as far: past a neighbour, where a cube still upstream has no other way
        jumps = np.concatenate([self.drawn.jumps_m, self.drawn.jumps_m * [2.0, 1.0]])
        places = np.add(jumps, [self.cube_m(self.target)[0], 0.0])
        for cube in moved:
            there = [self.cube_m(other)[0] for other in self.drawn.cubes if other != cube]
            for x, y in places:  # the first that lies around the belt's middle and clear of the others
                if abs(x) < 0.25 and all(abs(other - x) > 0.07 for other in there):
                    self._put(cube, np.array([x, y, REST_Z_M]), speed_m_s=self.drawn.belt_m_s)
                    break

    def _move_blobs(self) -> None:
        for i in range(self.task.blobs):
            phase, rate, depth = self.drawn.blob_phase[i]
            x = 0.3 * np.sin(phase + rate * self.tick / CONTROL_HZ)
            self.data.mocap_pos[self._mocap[f"blob{i}"]] = [x, depth, 0.03]

    def _remember(self) -> None:
        self.past.append((self.tick, self.data.qpos.copy(), self.data.mocap_pos.copy()))

    # --- looking ----------------------------------------------------------------------------------------------------

    def cube_m(self, cube: str) -> Vector:
        """Centre of a cube, [3]."""
        return np.array(self.data.body(cube).xpos)

    def sight(self) -> Sight:
        """The true state now, see `Sight`."""
        hand = np.array(self.data.xpos[self._hand])
        right, left = (self.data.xpos[pad] for pad in self._pads)
        return Sight(
            tick=self.tick,
            hand_m=hand,
            offset_m=self.data.mocap_pos[self._mocap["mocap"]] - hand,
            gap_m=float(np.linalg.norm(right - left)),
            target_m=self.cube_m(self.target),
            belt_m_s=self.drawn.belt_m_s,
            post_m=self.drawn.post_m[:2] if self.task.post else None,
            well_m=self.drawn.well_m if self.task.goal == "insert" else None,
        )

    # --- scoring ----------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        sight = self.sight()
        others = [cube for cube in self.drawn.cubes if cube != self.target]
        good = self._achieved(self.target, sight)
        self._good_ticks = self._good_ticks + 1 if good else 0
        self._bad_ticks = self._bad_ticks + 1 if any(self._achieved(cube, sight) for cube in others) else 0
        x, _, z = sight.target_m
        after_event = self.event_tick is None or self.tick >= self.event_tick
        self.score = Score(
            success=self.score.success or (self._good_ticks >= HELD_TICKS and after_event and not self.score.collision),
            wrong_object=self.score.wrong_object or (self._bad_ticks >= HELD_TICKS and after_event),
            lost=self.score.lost or bool(abs(x) > BELT_END_M or z < -0.05),
            collision=self.score.collision or self._touches_post(),
        )

    def _achieved(self, cube: str, sight: Sight) -> bool:
        place = self.cube_m(cube)
        if sight.well_m is None:
            return bool(place[2] > LIFTED_Z_M and np.linalg.norm(place - sight.hand_m) < 0.12)
        inside = np.abs(place[:2] - sight.well_m[:2]).max() < WELL_TOLERANCE_M and place[2] < CUBE_HALF_M + 0.003
        return bool(inside and sight.gap_m > 2 * CUBE_HALF_M + 0.02)

    def _touches_post(self) -> bool:
        return self.task.post and any(
            self._post_geom in (contact.geom1, contact.geom2) for contact in self.data.contact[: self.data.ncon]
        )


def draw(task: Task, belt_range: Range, rng: np.random.Generator) -> Draw:
    """All random numbers of one episode, in one order whatever the task."""
    uniform = rng.uniform
    hand = np.array([uniform(-0.1, 0.1), uniform(0.5, 0.58), uniform(0.16, 0.24)])
    side = float(rng.choice([-1.0, 1.0]))
    belt = float(uniform(*belt_range)) * side + 0.0  # + 0.0: no minus zero
    cubes = tuple(str(name) for name in rng.permutation(COLOURS)[: task.cubes])
    target = cubes[int(rng.integers(task.cubes))]
    spread = (0.11 if task.cubes < 3 else 0.075) * np.arange(task.cubes)  # three still start inside the front view
    start = uniform(0.0, 1.0)
    # a running belt brings the cubes from upstream, towards the middle; a resting one has them near the middle
    x = -side * (spread + 0.08 + 0.08 * start) if belt else spread - 0.12 + 0.09 * start
    y = BELT_Y_M + uniform(-0.03, 0.03, task.cubes)
    middle, near = uniform(-0.08, 0.08), uniform(-1.0, 1.0, 4)
    if task.post:
        hand = np.array([middle + 0.01 * near[0], 0.43 + 0.01 * near[1], 0.13 + 0.3 * (hand[2] - 0.2)])
        x = np.full(task.cubes, middle + 0.01 * near[2] - belt * PAST_THE_POST_S)
        y = np.full(task.cubes, BELT_Y_M + 0.02 + 0.01 * near[3])
    low, high = task.event_ticks
    jumps = rng.choice([-1.0, 1.0], 16) * uniform(0.07, 0.13, 16)
    return Draw(
        hand_m=hand,
        belt_m_s=belt,
        cubes=cubes,
        target=target,
        cube_xy_m=np.stack([x, y], axis=1),
        post_m=np.array([middle, 0.53, 0.17]),
        well_m=np.array([middle, 0.515 + 0.015 * near[0], 0.0]),
        event_tick=int(rng.integers(low, high + 1)),
        jumps_m=np.stack([jumps, BELT_Y_M + uniform(-0.03, 0.03, 16)], axis=1),
        blob_phase=np.stack([uniform(0, 2 * np.pi, 2), uniform(1.0, 3.0, 2), np.array([0.80, 0.50])], axis=1),
        flicker_seed=int(rng.integers(2**31)),
    )
