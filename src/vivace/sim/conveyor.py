"""The conveyor environment: a Sawyer arm over a moving belt, a named cube to pick up, 50 Hz control, Gymnasium's API.

    env = ConveyorEnv("conveyor")                      # tasks.py lists the names
    observation, info = env.reset(seed=7)              # {"state": float32 [7], "prompt": str}
    observation, reward, terminated, truncated, info = env.step(action)      # float32 [4] in [-1, 1]
    env.look()                                         # vivace Observation: three views, state, prompt

A look costs a hundred control ticks, so `step` makes no image and `look` renders when a policy wants to see; `images=True`
puts the views into every observation, as Gymnasium's convention wants it. The third view is the front camera 100 ms ago:
from one frame nobody can tell how fast the belt runs. It is rendered anew from the remembered state.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ..errors import ConfigError, ShapeError
from ..types import Observation
from . import scene
from .render import Library, Renderer
from .tasks import Range, Task, task
from .world import Sight, Vector, World

VIEWS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""Front camera, wrist camera, front camera 100 ms ago; the names are those of `robots.conveyor`."""
STATE_DIM, ACTION_DIM = 7, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz "


class ConveyorEnv(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """One arm, one belt, one task.

    Args:
        name: a task's name, or a Task of your own.
        belt_m_s: replaces the task's range of belt speeds (tasks.SPEEDS_M_S has named ones).
        image_px: views are image_px x image_px.
        images: put the views into every observation.
        library: which GL renders, see `render.Renderer`.
    Raises: ConfigError for an unknown task; Unsupported at the first image where no GL works.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": int(scene.CONTROL_HZ)}  # noqa: RUF012
    control_hz = scene.CONTROL_HZ

    def __init__(
        self,
        name: str | Task = "conveyor",
        *,
        belt_m_s: Range | None = None,
        image_px: int = 224,
        images: bool = False,
        library: Library = "auto",
        render_mode: str | None = None,
    ) -> None:
        self.task = task(name) if isinstance(name, str) else name
        self.render_mode = render_mode
        self.world = World(self.task, belt_m_s=belt_m_s)
        self.image_px, self.images, self._library = image_px, images, library
        self._renderer: Renderer | None = None
        self._ghost: mujoco.MjData | None = None
        image = spaces.Box(0, 255, (image_px, image_px, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "state": spaces.Box(-2.0, 2.0, (STATE_DIM,), np.float32),
                "prompt": spaces.Text(64, charset=LETTERS),
                **(dict.fromkeys(VIEWS, image) if images else {}),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    # --- Gymnasium --------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode. options: {"event": False} leaves the jump or swap out, the rest being equal.

        Raises: ConfigError for another option.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        event = bool(options.pop("event", True))
        if options:
            raise ConfigError("unknown reset option", got=sorted(options), wanted="some of ['event']")
        self.world.reset(self.np_random, event=event)
        return self._observation(), self._info()

    def step(self, action: NDArray[np.floating]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Advance 20 ms. action [4] in [-1, 1]: hand velocity x, y, z (1 = 0.5 m/s), grip (1 closes, -1 opens).

        Reward 1 at the tick of success, else 0. Ends at success, when the target is lost, or when the post is touched.
        Raises: ShapeError for another shape or a number that is not finite.
        """
        action = np.asarray(action)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ShapeError("action", got=f"shape {action.shape}, {action}", wanted=f"{ACTION_DIM} finite numbers")
        self.world.step(action)
        score = self.world.score
        ended = score.success or score.lost or score.collision
        truncated = not ended and self.world.tick >= self.task.max_ticks
        return self._observation(), float(score.success), ended, truncated, self._info()

    def render(self) -> NDArray[np.uint8] | None:
        """The front view, uint8 [image_px, image_px, 3], in render mode "rgb_array"."""
        return self._front(self.world.data, self.world.tick) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Free the GL context, if one was made."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # --- vivace -----------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> str:
        """The instruction as it stands now; task `swap` changes it in mid-episode."""
        cube = self.world.target
        return f"put the {cube} cube into the well" if self.task.goal == "insert" else f"pick up the {cube} cube"

    @property
    def renderer(self) -> str | None:
        """Which GL library renders; None until the first image."""
        return self._renderer.name if self._renderer else None

    def look(self) -> Observation:
        """What a policy sees now: views uint8 [image_px, image_px, 3], state float32 [7], prompt, t_obs in s."""
        return Observation(
            views=self._views(), state=self._state(), prompt=self.prompt, t_obs=self.world.tick / self.control_hz
        )

    def cameras(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Front and wrist view now, uint8 [image_px, image_px, 3]; who keeps every tick's has the third view already."""
        tick = self.world.tick
        return self._front(self.world.data, tick), self._image(self.world.data, "gripperPOV", tick)

    def feel(self) -> Observation:
        """The same without images, for policies that use none (experts)."""
        return Observation(views={}, state=self._state(), prompt=self.prompt, t_obs=self.world.tick / self.control_hz)

    def sight(self) -> Sight:
        """The true state, for experts."""
        return self.world.sight()

    def hold(self, last: NDArray[np.floating] | None) -> NDArray[np.float32]:
        """The action of a robot that waits: no motion, fingers as they were told last (open before the first action)."""
        return np.array([0.0, 0.0, 0.0, -1.0 if last is None else last[3]], np.float32)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _state(self) -> NDArray[np.float32]:
        sight = self.world.sight()
        return np.array([*sight.hand_m, sight.gap_m, *sight.offset_m], np.float32)

    def _observation(self) -> dict[str, Any]:
        return {"state": self._state(), "prompt": self.prompt, **(self._views() if self.images else {})}

    def _info(self) -> dict[str, Any]:
        score = self.world.score
        return {
            "task": self.task.name,
            "tick": self.world.tick,
            "success": score.success,
            "wrong_object": score.wrong_object,
            "lost": score.lost,
            "collision": score.collision,
            "target": self.world.target,
            "belt_m_s": self.world.drawn.belt_m_s,
            "event_tick": self.world.event_tick,
            "position_m": self.world.sight().hand_m,
            **scene.versions(),
        }

    def _views(self) -> dict[str, NDArray[np.uint8]]:
        tick, qpos, mocap = self.world.past[0]
        images = (
            self._front(self.world.data, self.world.tick),
            self._image(self.world.data, "gripperPOV", self.world.tick),
            self._front(self._posed(qpos, mocap), tick),
        )
        return dict(zip(VIEWS, images, strict=True))

    def _front(self, data: mujoco.MjData, tick: int) -> NDArray[np.uint8]:
        return self._image(data, "front", tick)

    def _posed(self, qpos: Vector, mocap: Vector) -> mujoco.MjData:
        if self._ghost is None:
            self._ghost = mujoco.MjData(self.world.model)
        ghost, model = self._ghost, self.world.model
        ghost.qpos[:], ghost.mocap_pos[:], ghost.mocap_quat[:] = qpos, mocap, self.world.data.mocap_quat
        mujoco.mj_kinematics(model, ghost)
        mujoco.mj_comPos(model, ghost)
        mujoco.mj_camlight(model, ghost)
        return ghost

    def _image(self, data: mujoco.MjData, camera: str, tick: int) -> NDArray[np.uint8]:
        if self._renderer is None:
            self._renderer = Renderer(self.world.model, self.image_px, library=self._library)
        image = self._renderer.image(data, camera)
        if not self.task.flicker:
            return image
        # a function of the tick, not of how often somebody looked
        rng = np.random.default_rng([self.world.drawn.flicker_seed, tick])
        gain = rng.uniform(1.0 - self.task.flicker, 1.0 + self.task.flicker)
        flickered: NDArray[np.uint8] = np.clip(image * gain, 0, 255).astype(np.uint8)
        return flickered
