"""A real policy behind the server: 20 clients, 2,000 requests, every answer equal to the one computed alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.sync.client import connect

import vivace
from vivace.check import observations
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.config import EngineConfig
from vivace.serving.protocol import pack, unpack
from vivace.serving.thread import serve_in_thread

CLIENTS, REQUESTS, DISTINCT = 20, 100, 25


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "policy"
    make_checkpoint(folder, Recipe(size="tiny", kind="pi05", format="lerobot", horizon=8, cameras=("front",)))
    return vivace.load_policy(folder, config=EngineConfig(num_denoise_steps=2))


def test_20_clients_2000_requests_equal_the_serial_answers(policy):
    requests = observations.synthetic(policy.io, DISTINCT, seed=11)
    serial = [policy.infer(request).actions for request in requests]
    assert len({answer.tobytes() for answer in serial}) == DISTINCT  # otherwise equality would show nothing

    def client(number: int, port: int) -> int:
        order = np.random.default_rng(number).integers(0, DISTINCT, REQUESTS)
        wrong = 0
        with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as socket:
            socket.recv(timeout=30)
            for index in order:
                socket.send(pack(requests[index]))
                answer = unpack(socket.recv(timeout=60))
                wrong += not np.array_equal(answer["actions"], serial[index])
        return wrong

    with serve_in_thread(policy, port=0) as handle, ThreadPoolExecutor(CLIENTS) as pool:
        wrong = list(pool.map(lambda number: client(number, handle.port), range(CLIENTS)))
    assert wrong == [0] * CLIENTS
