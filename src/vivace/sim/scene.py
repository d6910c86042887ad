"""The MuJoCo model of the conveyor, and which version of it this is.

Every result stores `scene_sha256` and MuJoCo's version: equal seeds promise equal episodes only between equal versions.
The hash covers every file below assets/ that MuJoCo reads (XML, meshes, textures), so it moves with any edit of the scene.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import mujoco

ASSETS = Path(__file__).parent / "assets"
SCENE = ASSETS / "conveyor" / "conveyor.xml"

COLOURS = ("red", "green", "blue")
CUBE_HALF_M = 0.018
BELT_TOP_M = 0.011
BELT_Y_M = 0.65
REST_Z_M = BELT_TOP_M + CUBE_HALF_M
"""Height of the centre of a cube that lies on the belt."""
SUBSTEPS = 8
"""8 x 2.5 ms of physics make one control tick."""
CONTROL_HZ = 50.0


def scene_sha256(folder: Path = ASSETS) -> str:
    """Hash over names and bytes of all scene files below a folder, hex."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".xml", ".stl", ".png"}:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a result must store about the simulator: {"scene_sha256", "mujoco"}."""
    return {"scene_sha256": _sha256_once(), "mujoco": mujoco.mj_versionString()}


@cache
def _sha256_once() -> str:
    return scene_sha256()


def load() -> mujoco.MjModel:
    """Compile the scene (0.15 s). Each environment has its own model."""
    return mujoco.MjModel.from_xml_path(str(SCENE))
