"""The robot's side of boundary B3, in a process of its own: asks several servers in rounds, and times every round trip.

    python -m vivace.check.hopper_client < question > answer

Both are messages of `serving.protocol`. Question: {"client": one of CLIENTS, "urls": {engine: ws://...}, "request":
observation, "alone": {engine: actions of its policy without a server}, "calls": samples of each engine, "seed": order of
the engines}. Answer: {engine: {"times": fields of `bench.EngineTimes`, "same", "of"}}. Needs no torch, as a robot does not.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from ..serving.protocol import pack, unpack
from . import bench


class Bits:
    """Answers of each engine against those of its policy alone."""

    def __init__(self, alone: Mapping[str, Any]) -> None:
        self._alone = alone
        self.same: dict[str, int] = {}
        self.of: dict[str, int] = {}

    def stages(self, named: tuple[str, dict[str, Any]]) -> Mapping[str, float]:
        """Compare one answer; hands on how long the server took for it."""
        name, answer = named
        self.same[name] = self.same.get(name, 0) + int(np.array_equal(answer["actions"], self._alone[name]))
        self.of[name] = self.of.get(name, 0) + 1
        return {"server": answer["server_timing"]["infer_ms"]}


def asked(
    urls: Mapping[str, str], request: Mapping[str, Any], alone: Mapping[str, Any], *, calls: int, seed: int,
    client: str = "vivace",
) -> dict[str, Any]:  # fmt: skip
    """Round trips to every server; see the module's docstring. Raises what the client does, with a server's words."""
    bits = Bits(alone)
    with ExitStack() as stack:
        clients = {name: CLIENTS[client](url, stack) for name, url in urls.items()}
        times = bench.measure(
            {name: _round_trip(name, ask, request) for name, ask in clients.items()}, samples=calls,
            seed=seed, warmup=bench.SHORT_WARM_UP, stages=bits.stages,
        )  # fmt: skip
    return {name: {"times": asdict(one), "same": bits.same[name], "of": bits.of[name]} for name, one in times.items()}


Ask = Callable[[Mapping[str, Any]], dict[str, Any]]


def _ours(url: str, stack: ExitStack) -> Ask:
    from ..serving.client import PolicyClient

    return stack.enter_context(PolicyClient(url, None)).infer


def _openpis(url: str, stack: ExitStack) -> Ask:
    """As it is installed; it has no way to close its connection."""
    client = importlib.import_module("openpi_client.websocket_client_policy").WebsocketClientPolicy(url)
    stack.callback(client._ws.close)
    ask: Ask = client.infer
    return ask


CLIENTS: Final[Mapping[str, Callable[[str, ExitStack], Ask]]] = {"vivace": _ours, "openpi": _openpis}
"""Who asks: `serving.client`, or openpi's own client."""


def _round_trip(name: str, ask: Ask, request: Mapping[str, Any]) -> Callable[[], Any]:
    """Packing and unpacking are inside: the robot waits for them as well."""
    return lambda: (name, ask(request))


def main() -> int:
    """Question on standard input, answer on standard output."""
    sys.stdout.buffer.write(pack(asked(**unpack(sys.stdin.buffer.read()))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
