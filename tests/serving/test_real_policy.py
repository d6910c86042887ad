"""A real policy behind the server: 20 clients, 2,000 requests, every answer equal to the one computed alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_recorded_on_one_thread_answer_alike_on_two():
    """One client is answered on the event loop, two by the worker; also a bucket that the warm-up did not record."""
    config = EngineConfig(backend="cuda_graph", device="cuda", precision="bfloat16+vision")
    policy = vivace.load_policy("conveyor-small", config=config)
    requests = observations.synthetic(policy.io, 4, seed=3, prepare=policy.prepare)
    threads = []

    class Watched:
        metadata, engine, quick, warmup = policy.metadata, policy.engine, policy.quick, lambda self: policy.warmup([8])

        def infer(self, request):
            threads.append(threading.current_thread().name)
            return policy.infer(request)

    def answers(port: int, clients: int) -> list[list[np.ndarray]]:
        with ExitStack() as stack:
            sockets = [
                stack.enter_context(connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None))
                for _ in range(clients)
            ]
            for socket in sockets:
                socket.recv(timeout=30)
            found = []
            for socket in sockets:
                found.append([])
                for request in (
                    *requests,
                    *requests,
                ):  # a bucket that is new takes long, and the next goes to the worker
                    socket.send(pack(request))
                    found[-1].append(unpack(socket.recv(timeout=60))["actions"])
            return found

    with serve_in_thread(Watched(), port=0) as handle:
        alone, both = answers(handle.port, 1), answers(handle.port, 2)
    assert set(threads[:8]) == {"vivace-inference", "vivace-serving"}
    assert set(threads[8:]) == {"vivace-inference"}
    expected = np.array([policy.infer(request).actions for request in (*requests, *requests)])
    assert all(np.array_equal(found, expected) for found in (*alone, *both))
