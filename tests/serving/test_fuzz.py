"""Malformed frames from a seeded generator: each is refused or decoded, nothing hangs, memory stays flat.

10,000 go through sockets, as hostile or broken peers send them; the codec alone sees some thousands more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from vivace.errors import ProtocolError
from vivace.serving import ServerHandle, pack, unpack

Make = Callable[[random.Random], bytes]

SEEDS = [
    pack(
        {
            "observation/image": np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3),
            "observation/state": np.linspace(-1, 1, 8),
            "prompt": "pick up the marker é",
        }
    ),
    pack({"a": np.zeros((0, 3), np.float32), "b": np.float32(1.5), "c": [1, -2.5, "x", [True, None]], "d": b"raw"}),
    pack({"images": {"cam_high": np.ones((3, 4, 5), ">f4")}, "state": np.arange(14.0), "flag": np.bool_(True)}),
]
INTERESTING = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xdc\xff\xff",
    b"\xc7\xff\x00",
    b"\xd8\x01",
    b"\xc1",
    b"\x8f",
    b"\x9f",
    b"\xcf" + b"\xff" * 8,
    b"\xc4\x0b__ndarray__\xc3",
    b"\xc4\x0d__npgeneric__\xc3",
    b"\xc4\x05dtype\xa2|O",
    b"\xc4\x05shape\x92\xd3\x80\x00\x00\x00\x00\x00\x00\x00\xcf\x7f\xff\xff\xff\xff\xff\xff\xff",
)
DTYPES = ("<f4", "|O", "O", "<c8", "|V8", "f4,f4", "<M8[ns]", "|S0", "<f99", "", "x" * 100, "<U1000000000", "|b1")

IN_FLIGHT = 8
ANSWER_WITHIN_S = 20.0
CROWD_WITHIN_S = 100.0  # bounds for what must end, not measures of how fast: 10,000 frames take about 12 s on one core


def mutated(rng: random.Random) -> bytes:
    """A valid frame with one to six accidents, most often one: those reach deepest."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.choice(INTERESTING)
            case 3:
                data[at : at + 5] = rng.choice(INTERESTING)
            case 4:
                del data[at : at + rng.randint(1, 20)]
            case 5:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case 6 if at < len(data):
                data[at] = rng.randrange(256)
    return bytes(data)


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(200))


def hostile(rng: random.Random) -> bytes:
    """Well-formed msgpack with ill-meant content, and headers that promise what does not come."""
    match rng.randrange(6):
        case 0:
            return rng.choice((b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01")) * rng.randint(1, 20_000) + b"\xc0"
        case 1:
            return b"\xdd" + (100_000).to_bytes(4, "big") + rng.choice((b"\x90", b"\x80", b"\xc0", b"\xa0")) * 100_000
        case 2:
            return b"\xdd\x00\x01\x00\x00" * rng.randint(1, 1000) + rng.randbytes(100)
        case 3:
            shape = [rng.choice((0, 1, 3, -1, 2**31, 2**63, 2**64 - 1)) for _ in range(rng.randint(0, 40))]
            fields = {
                b"__ndarray__": True,
                b"data": rng.randbytes(rng.choice((0, 12))),
                b"dtype": "<f4",
                b"shape": shape,
            }
            return pack({"x": fields})
        case 4:
            fields = {
                b"__ndarray__": True,
                b"data": bytes(8),
                b"dtype": rng.choice(DTYPES),
                b"shape": [rng.choice((0, 1, 2, 8))],
            }
            return pack({"x": [fields] * rng.randint(1, 3)})
    value = rng.choice((1e300, -1, 2**63, "text", b"x" * 100, None, [], {}))
    return pack({"x": {b"__npgeneric__": True, b"data": value, b"dtype": rng.choice(DTYPES)}})


def frames(seed: int, count: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    makers: list[Make] = [mutated, mutated, noise, hostile]
    for index in range(count):
        yield makers[index % len(makers)](rng)


def resident_bytes() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


def try_all(seed: int, count: int) -> dict[str, int]:
    seen = {"refused": 0, "decoded": 0}
    for frame in frames(seed, count):
        try:
            value = unpack(frame)
        except ProtocolError:  # any other exception fails the test
            seen["refused"] += 1
        else:
            seen["decoded"] += 1
            assert unpack(pack(value)) is not Ellipsis  # what was decoded can be sent again
    return seen


def test_the_codec_refuses_or_decodes_every_frame_with_flat_memory() -> None:
    try_all(seed=1, count=1000)  # what is allocated once, is allocated
    before = resident_bytes()
    seen = try_all(seed=2, count=2000)
    grown = resident_bytes() - before
    assert sum(seen.values()) == 2000
    assert seen["refused"] > 1000, seen
    assert seen["decoded"] > 60, seen  # the generator also reaches what lies behind the structure
    assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MiB more after {seen}"


@pytest.mark.filterwarnings("error")
def test_no_malformed_frame_gives_a_warning() -> None:
    try_all(seed=3, count=2000)


async def next_answer(peer: ClientConnection) -> bytes | str:
    async with asyncio.timeout(ANSWER_WITHIN_S):
        return await peer.recv()


async def misbehave(port: int, source: Iterator[bytes], seen: dict[str, int]) -> None:
    """Send frames until there are none left. A refused one must cost exactly this connection; then connect again."""
    for first in source:
        frame: bytes | None = first
        async with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as peer:
            await next_answer(peer)  # metadata
            while frame is not None:
                await peer.send(frame)
                if isinstance(await next_answer(peer), bytes):
                    seen["answered"] += 1
                    frame = next(source, None)
                    continue
                seen["refused"] += 1
                with pytest.raises(ConnectionClosed) as closed:
                    await next_answer(peer)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1011
                break


async def behave(port: int, answers: Callable[[Any], Any], seen: dict[str, int], over: asyncio.Event) -> None:
    """A good client beside them, on one connection from the first bad frame to the last."""
    async with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as peer:
        await next_answer(peer)  # metadata
        while not over.is_set():
            request = {"observation/state": np.arange(7.0), "prompt": f"go on {seen['good']}"}
            await peer.send(pack(request))
            answer = await next_answer(peer)
            assert isinstance(answer, bytes), answer
            np.testing.assert_array_equal(unpack(answer)["actions"], answers(request).actions)
            seen["good"] += 1


async def crowd(port: int, answers: Callable[[Any], Any], *, seed: int, count: int) -> dict[str, int]:
    """`count` bad frames over `IN_FLIGHT` connections at once, and one good client beside them."""
    seen, source, over = {"refused": 0, "answered": 0, "good": 0}, frames(seed, count), asyncio.Event()
    async with asyncio.timeout(CROWD_WITHIN_S), asyncio.TaskGroup() as good:
        good.create_task(behave(port, answers, seen, over))
        async with asyncio.TaskGroup() as bad:
            for _ in range(IN_FLIGHT):
                bad.create_task(misbehave(port, source, seen))
        over.set()
    return seen


def test_10_000_malformed_frames_through_sockets(
    server: ServerHandle, digest_policy: Any, open_client: Any, counted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each costs at most its own connection: a text frame, then 1011. Memory is flat, a good client sees nothing."""
    caplog.set_level(logging.CRITICAL, logger="vivace.serving")  # pytest keeps every record: that is not the server's

    def send(*, seed: int, count: int) -> dict[str, int]:
        return asyncio.run(crowd(server.port, digest_policy.infer, seed=seed, count=count))

    send(seed=5, count=1000)  # what is allocated once, is allocated
    before = resident_bytes()
    seen = send(seed=4, count=10_000)
    grown = resident_bytes() - before
    assert seen["refused"] + seen["answered"] == 10_000
    assert seen["refused"] > 8000, seen
    assert seen["answered"] > 300, seen
    assert seen["good"] > 500, seen
    assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MiB more after {seen}"
    assert counted(server.port, 'vivace_errors_total{error="ProtocolError"}') > 8000
    assert open_client(server.port).ask({"prompt": "still here"})["actions"].shape == (10, 7)


def test_garbage_below_the_protocol(
    server: ServerHandle, digest_policy: Any, open_client: Any, wait_until: Any
) -> None:
    """Bytes that are no HTTP, half a handshake, websocket frames that break the rules: only that peer is affected."""
    handshake = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    rng = random.Random(5)
    good = open_client(server.port)
    for index in range(100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
            garbage = rng.randbytes(rng.randrange(1, 300))
            peer.sendall((b"", handshake[: rng.randrange(len(handshake))], handshake)[index % 3] + garbage)
    request = {"prompt": "still here"}
    np.testing.assert_array_equal(good.ask(request)["actions"], digest_policy.infer(request).actions)
    assert open_client(server.port).ask(request)["actions"].shape == (10, 7)
