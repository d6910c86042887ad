"""The robot's side of boundary B3, in a process of its own: asks several servers in rounds, and times every round trip.

    python -m vivace.check.hopper_client < question > answer

Both are messages of `serving.protocol`. Question: {"urls": {engine: ws://...}, "request": observation, "alone": {engine:
actions of its policy without a server}, "calls": samples of each engine, "seed": order of the engines}. Answer: {engine:
{"times": fields of `bench.EngineTimes`, "same", "of"}}.
Connects as openpi's client does: no compression, no bound on a message, msgpack. Needs no torch, as a robot does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from ..errors import NumericsError
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
    urls: Mapping[str, str], request: Mapping[str, Any], alone: Mapping[str, Any], *, calls: int, seed: int
) -> dict[str, Any]:
    """Round trips to every server; see the module's docstring. Raises NumericsError with a server's error text."""
    bits = Bits(alone)
    with ExitStack() as stack:
        open_to = {
            name: stack.enter_context(connect(url, compression=None, max_size=None)) for name, url in urls.items()
        }
        for connection in open_to.values():
            connection.recv()  # the metadata, once
        times = bench.measure(
            {name: _round_trip(name, connection, request) for name, connection in open_to.items()}, samples=calls,
            seed=seed, warmup=bench.SHORT_WARM_UP, stages=bits.stages,
        )  # fmt: skip
    return {name: {"times": asdict(one), "same": bits.same[name], "of": bits.of[name]} for name, one in times.items()}


def _round_trip(name: str, connection: ClientConnection, request: Mapping[str, Any]) -> Callable[[], Any]:
    """Packing and unpacking are inside: the robot waits for them as well."""

    def ask() -> tuple[str, dict[str, Any]]:
        connection.send(pack(dict(request)))
        answer = connection.recv()
        if isinstance(answer, str):
            raise NumericsError(f"the server of {name} sent an error", got=answer[-400:])
        return name, unpack(answer)

    return ask


def main() -> int:
    """Question on standard input, answer on standard output."""
    sys.stdout.buffer.write(pack(asked(**unpack(sys.stdin.buffer.read()))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
