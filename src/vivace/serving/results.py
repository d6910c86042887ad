"""What a client gets for one observation: openpi's result dict, made from an ActionChunk.

Rule of the wire: `openpi_client.ActionChunkBroker` slices every ndarray of a result along its first axis, one step per
control tick. So `actions` is the only array here; every other fact is a Python number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..config import ResolvedEngine
from ..errors import NumericsError, ShapeError
from ..types import ActionChunk
from .protocol import pack, unpack

MODEL_STAGES: Final = ("vision", "prefix", "denoise")


def result_of(chunk: ActionChunk, *, infer_ms: float, prev_total_ms: float | None) -> dict[str, Any]:
    """openpi's result: actions [H, A] as the policy gave them, and two timing dicts in milliseconds.

    policy_timing.infer_ms  model time only: vision + prefix + denoise where all are known, else the policy's total
    server_timing.infer_ms  the whole `policy.infer`; prev_total_ms: receive to sent of this connection's previous request,
                            absent on the first

    Raises ShapeError if actions are not [H, A], NumericsError if one is not finite: no robot should receive it.
    """
    actions = np.asarray(chunk.actions)
    if actions.ndim != 2 or actions.dtype.kind != "f":
        raise ShapeError(
            "policy returned unusable actions", got=f"{actions.dtype} {actions.shape}", wanted="float [H, A]"
        )
    if not np.isfinite(actions).all():
        raise NumericsError(
            "policy returned actions that are not finite", got=f"{actions.size} values, some NaN or infinite"
        )
    server_timing = {"infer_ms": float(infer_ms)}
    if prev_total_ms is not None:
        server_timing["prev_total_ms"] = float(prev_total_ms)
    return {"actions": actions, "policy_timing": policy_timing(chunk.milliseconds), "server_timing": server_timing}


def policy_timing(milliseconds: Mapping[str, float]) -> dict[str, float]:
    """`infer_ms` as above, then every stage as `{stage}_ms`; empty when the policy timed nothing."""
    timing: dict[str, float] = {}
    if all(stage in milliseconds for stage in MODEL_STAGES):
        timing["infer_ms"] = float(sum(milliseconds[stage] for stage in MODEL_STAGES))
    elif "total" in milliseconds:
        timing["infer_ms"] = float(milliseconds["total"])
    timing.update({f"{stage}_ms": float(value) for stage, value in milliseconds.items()})
    return timing


def metadata_frame(metadata: Mapping[str, Any], engine: ResolvedEngine) -> bytes:
    """The first frame of every connection: the robot's metadata plus `vivace`, the ResolvedEngine as JSON types.

    Raises ProtocolError if a client could not decode it.
    """
    record = json.loads(json.dumps(engine.to_json(), default=str))
    frame = pack({**metadata, "vivace": record})
    unpack(frame)
    return frame
