"""What every Triton launch of vivace needs to know about its surroundings.

Programmatic dependent launch (Hopper and later): a kernel may start while its predecessor drains. The rules that keep it
correct, which every kernel of a chain obeys:

* before `gdc_wait` only constants are read, or data that was complete before the predecessor began;
* every kernel waits, also one that reads nothing of its predecessor, else the chain behind it breaks;
* `gdc_launch_dependents` comes after the own wait, as a rule. Where the successor is heavy it comes after the main loop
  too (LATE), because an early successor takes shared memory and issue slots from its predecessor; where it is light,
  right away (EARLY);
* before the own wait (FIRST) only where the successor reads nothing but weights before its own wait: then it may begin
  while the predecessor's predecessor still runs. It waits for its predecessor, which waited for all before it.

A processor divides one memory into L1 cache and shared memory, and can change the division only while it is idle. Kernels
that want different divisions therefore cannot overlap on it. `share` asks for the same division for all of a chain.

Triton's interpreter (CPU, tests) knows neither the wait nor the launch option, and multiplies the raw bits of 16-bit
operands in a dot; kernels take PDL and INTERPRET as compile-time switches for that.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
import triton
from torch import Tensor

LATE, EARLY, FIRST = 0, 1, 2  # when a kernel lets its successor launch; True is EARLY
BY_DRIVER, MOST = -1, 100  # per cent of the memory of a processor for `share`
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
logger = logging.getLogger(__name__)
INTERPRET: bool = bool(triton.knobs.runtime.interpret)


@functools.cache
def _programmatic(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def programmatic(x: Tensor) -> bool:
    """Whether kernels on x's device may be launched programmatically."""
    return x.is_cuda and not INTERPRET and _programmatic(x.device.index)


@functools.cache
def shared_bytes(device: torch.device) -> int | None:
    """Shared memory that one program on this device may have; None on a CPU, which has no such bound."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stubs lack it


def stages_that_fit(stages: int, *, bytes_each: int, device: torch.device) -> int:
    """At most `stages` of a loop, each with so many bytes of shared memory. On Hopper all fit that were chosen there.

    A loop of n stages keeps n - 1 blocks beside the one that it multiplies.
    """
    room = shared_bytes(device)
    if room is None:
        return stages
    return max(1, min(stages, 1 + (room - 1024) // bytes_each))


def options(x: Tensor, *, warps: int, stages: int = 1, early: int = LATE) -> dict[str, Any]:
    """Launch keywords of one kernel; `PDL`, `EARLY` and `INTERPRET` are its compile-time switches."""
    if INTERPRET:
        return {"PDL": False, "EARLY": LATE, "INTERPRET": True}
    pdl = programmatic(x)
    more = {"launch_pdl": True} if pdl else {}
    return {"num_warps": warps, "num_stages": stages, "PDL": pdl, "EARLY": int(early), "INTERPRET": False, **more}


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def share(launched: Any, percent: int) -> None:
    """Later launches of this kernel ask for `percent` of the memory as shared memory. A wish: it changes time, no result.

    The wish belongs to the compiled function, not to the launch: calls that share a function (one kernel at the same
    compile-time settings) and wish differently overwrite each other, and the last one holds. A driver that refuses is
    named once in the log, as nothing but time is lost.

    launched  what `kernel[grid](...)` returned; the interpreter returns None
    """
    if launched is not None:
        status = _driver().cuFuncSetAttribute(ctypes.c_void_p(launched.function), _CARVEOUT, percent)
        if status:
            _refused(status)


@functools.cache
def _refused(status: int) -> None:
    """Once per status."""
    logger.warning(
        "the driver refuses to divide a processor's memory as asked (CUDA error %d): kernels are slower", status
    )
