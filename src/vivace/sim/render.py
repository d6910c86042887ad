"""Images without a screen: EGL where it works (GPU driver or Mesa's software), else OSMesa; `Renderer.name` says which.

MuJoCo's own Renderer picks the library by an environment variable; this one takes the choice as an argument. Shadows and
reflections are off: with software GL they cost 4 to 16 times the rest of the image. Most of the remaining cost is the
meshes' vertices, so a 64 pixel image costs more than half of a 224 pixel one: render rarely rather than small.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from ..errors import Unsupported

Library = Literal["auto", "egl", "osmesa"]
LIBRARIES: tuple[Library, ...] = ("egl", "osmesa")
OFF = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)


class Renderer:
    """One GL context and one image size. Close it: contexts that die at interpreter exit print tracebacks.

    Args:
        size_px: images are size_px x size_px.
        library: which GL, "auto" takes the first of egl, osmesa that gives a context.
    Raises:
        Unsupported: no library gives a context; the message has each one's reason.
    """

    def __init__(self, model: mujoco.MjModel, size_px: int, *, library: Library = "auto") -> None:
        self.size_px = size_px
        self.model = model
        self.name, self._gl = _context(size_px, library)
        model.vis.global_.offwidth = model.vis.global_.offheight = size_px
        self._scene = mujoco.MjvScene(model, maxgeom=400)
        for flag in OFF:
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = 0  # the finger tips' red marker balls look like the red cube
        self._rect = mujoco.MjrRect(0, 0, size_px, size_px)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def image(self, data: mujoco.MjData, camera: str) -> NDArray[np.uint8]:
        """What a named camera sees: uint8 [size_px, size_px, 3], first row = top."""
        self._gl.make_current()
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = self.model.camera(camera).id
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, data, self._option, None, view, category, self._scene)
        pixels = np.empty((self.size_px, self.size_px, 3), np.uint8)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, self._rect, self._context)
        return np.ascontiguousarray(pixels[::-1])

    def close(self) -> None:
        """Free the context, in this order: MuJoCo's buffers while the GL context still exists."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _context(size_px: int, library: Library) -> tuple[Library, Any]:
    reasons = []
    for name in LIBRARIES if library == "auto" else (library,):
        try:
            context = importlib.import_module(f"mujoco.{name}").GLContext(size_px, size_px)
            context.make_current()
        except (ImportError, RuntimeError, AttributeError, OSError) as error:
            # PyOpenGL: a library that is missing shows as an AttributeError of a None handle
            reasons.append(f"{name}: {error}")
        else:
            return name, context
    raise Unsupported(
        "no OpenGL context without a screen",
        got="; ".join(reasons),
        wanted="EGL or OSMesa",
        do="Debian/Ubuntu: make system (libegl1, libgl1, libosmesa6)",
    )
