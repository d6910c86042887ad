"""Images without a screen: EGL where installed (GPU driver or Mesa's software), else OSMesa; `Renderer.name` says which.

MuJoCo's own Renderer picks the library by an environment variable; this one takes the choice as an argument. Shadows and
reflections are off: with software GL they cost 4 to 16 times the rest of the image. Most of the remaining cost is the
meshes' vertices, so a 64 pixel image costs more than half of a 224 pixel one: render rarely rather than small.
"""

from __future__ import annotations

import ctypes.util
import importlib
import subprocess
import sys
from functools import cache
from typing import Any, Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from ..errors import Unsupported

Library = Literal["auto", "egl", "osmesa"]
FILES: dict[Library, str] = {"egl": "EGL", "osmesa": "OSMesa"}
INSTALL = "Debian/Ubuntu: make system (libegl1, libgl1-mesa-dri), or libosmesa6"
OFF = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)


class Renderer:
    """One GL context and one image size. Close it: contexts that die at interpreter exit print tracebacks.

    Args:
        size_px: images are size_px x size_px.
        library: which GL, see `choose`.
    Raises:
        Unsupported: the library is missing or gives no context.
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


def choose(library: Library = "auto") -> Library:
    """The library that would render: the one named, or of those installed the first of egl, osmesa that gives a context.

    Decided before anything is loaded: PyOpenGL binds to one library for the life of the process, there is no second try.
    So where there is a choice, another process tries (once, half a second).
    Raises: Unsupported where none is installed, or for an unknown name.
    """
    if library in FILES:
        return library
    if library == "auto":
        found = [name for name, file in FILES.items() if ctypes.util.find_library(file)]
        if found:
            return next((name for name in found[:-1] if _works(name)), found[-1])
    got = "neither is installed" if library == "auto" else repr(library)
    raise Unsupported("OpenGL without a screen", got=got, wanted="EGL or OSMesa", do=INSTALL)


@cache
def _works(name: Library) -> bool:
    """Whether a context can be made, in a process of its own: a library without a driver fails only then."""
    code = f"from mujoco.{name} import GLContext; c = GLContext(8, 8); c.make_current(); c.free()"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _context(size_px: int, library: Library) -> tuple[Library, Any]:
    name = choose(library)
    try:
        module = importlib.import_module(f"mujoco.{name}")
    except (ImportError, AttributeError, OSError) as error:  # PyOpenGL shows a missing library in each of these ways
        raise Unsupported(f"OpenGL by {name} cannot be loaded", got=error, do=INSTALL) from error
    from OpenGL.error import Error  # after mujoco's module, which chooses PyOpenGL's platform

    try:
        context = module.GLContext(size_px, size_px)
        context.make_current()
    except (RuntimeError, ImportError, Error) as error:  # ImportError is MuJoCo's for EGL without a driver
        other = next(one for one in FILES if one != name)
        raise Unsupported(
            f"{name} gives no OpenGL context", got=error, do=f"try library={other!r}; {INSTALL}"
        ) from error
    return name, context
