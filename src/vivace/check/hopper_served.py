"""Boundary B3 of the full-size benchmark: policies behind their servers here, the client in another process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from numpy.typing import NDArray

from ..config import ResolvedEngine
from ..runtime.policy import Policy
from ..serving.protocol import pack, unpack
from ..types import ActionChunk
from . import bench


class Rehearsed:
    """A policy as a server wants it, warmed up with the one request that will come instead of with every prompt length."""

    def __init__(self, policy: Policy, request: Mapping[str, Any]) -> None:
        self._policy, self._request = policy, request
        self.metadata, self.quick = policy.metadata, policy.quick

    @property
    def engine(self) -> ResolvedEngine:
        """What runs."""
        return self._policy.engine

    def infer(self, request: Mapping[str, Any], /) -> ActionChunk:
        """See Policy.infer."""
        return self._policy.infer(request)

    def warmup(self) -> None:
        """On the worker's thread; a quick policy then answers on the event loop's."""
        self._policy.infer(self._request)


def why_not(client: str = "vivace") -> str | None:
    """None if servers and this client (`hopper_client.CLIENTS`) can run here."""
    needed = {"vivace": ("websockets",), "openpi": ("websockets", "openpi_client")}[client]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def round_trips(
    policies: Mapping[str, Policy],
    request: Mapping[str, Any],
    alone: Mapping[str, NDArray[Any]],
    *,
    calls: int,
    client: str = "vivace",
    seed: int = 0,
    timeout_s: float = 300.0,
) -> dict[str, tuple[bench.EngineTimes, dict[str, int]]]:
    """Serve these policies on free loopback ports, and have another process ask them in rounds, through one client each.

    Returns  {engine: (times, of which `total_ms` are the round trips and stage "server" the servers' `policy.infer`;
             {"same", "of"}: answers with the bits of `alone`, the actions of the policy without a server)}
    Raises   SubprocessError when the client failed or took longer than `timeout_s`; its words are in it.
    """
    from ..serving.thread import serve_in_thread

    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(serve_in_thread(Rehearsed(policy, request))).url
            for name, policy in policies.items()
        }
        about = {"client": client, "calls": calls, "seed": seed}
        question = pack({"urls": urls, "request": dict(request), "alone": dict(alone), **about})
        command = [sys.executable, "-m", "vivace.check.hopper_client"]
        done = subprocess.run(command, input=question, capture_output=True, timeout=timeout_s)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()[-400:]
        raise subprocess.SubprocessError(f"the client failed with exit code {done.returncode}: {words}")
    return {
        name: (bench.EngineTimes(**one["times"]), {"same": one["same"], "of": one["of"]})
        for name, one in unpack(done.stdout).items()
    }
