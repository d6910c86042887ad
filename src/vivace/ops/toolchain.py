"""What Triton needs beside itself: it compiles a small C file for every process that launches a kernel on a GPU.

Without a C compiler and Python's headers the first launch raises a RuntimeError from within Triton. This looks first.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

INSTALL = "install gcc and Python's headers (Debian and Ubuntu: apt-get install gcc python3-dev)"


def compiler_missing() -> str | None:
    """What Triton would not find when it compiles its launcher, and what to install; None = nothing is missing.

    The order is that of triton/runtime/build.py: the compiler that the user named (CC, as Triton's knobs say), gcc, clang.
    Where Triton's cache holds a launcher that was compiled earlier, nothing is missed: such a machine once had all kernels.
    """
    import triton  # only here: `vivace doctor` asks without it

    knobs = triton.knobs.build
    if knobs.impl is not None:
        return None  # whoever replaced the build knows how to
    if any(Path(triton.knobs.cache.dir).glob("*/__triton_launcher*.so")):
        return None
    named = knobs.cc
    if named is not None and shutil.which(named) is None:
        return f"Triton needs a C compiler; CC names {named!r}, which is not on the PATH; {INSTALL}, or unset CC"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return f"Triton needs a C compiler; there is no gcc and no clang on the PATH; {INSTALL}"
    header = python_headers() / "Python.h"
    return None if header.is_file() else f"Triton compiles against Python's headers; there is no {header}; {INSTALL}"


def python_headers() -> Path:
    """The folder in which Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme for packages below /usr/local; Python itself is not there
    return Path(sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"])
