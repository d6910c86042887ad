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
from vivace.serving import PolicyClient
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_bucket_that_is_not_warm_is_recorded_on_the_event_loop():
    """Both buckets' graphs are then replayed by the worker as well, with the same bits."""
    config = EngineConfig(backend="cuda_graph", device="cuda", precision="bfloat16+vision", prompt_bucket=8)
    policy = vivace.load_policy("conveyor-small", config=config)
    like = observations.synthetic(policy.io, 2, seed=3, prepare=policy.prepare)
    short, long = {**like[0], "task": "red"}, {**like[1], "task": "put the red cube into the bin on the left side"}
    tokens = [len(policy.prepare(request).tokens) for request in (short, long)]
    assert tokens[0] // 8 < tokens[1] // 8, "two buckets"
    seen = []

    def captured():
        return policy.backend.describe()["graphs_captured"]

    class Watched:
        metadata, engine, quick = policy.metadata, policy.engine, policy.quick

        def warmup(self):
            policy.warmup([tokens[0]])

        def infer(self, request):
            before = captured()
            chunk = policy.infer(request)
            seen.append((threading.current_thread().name, captured() - before))
            return chunk

    with serve_in_thread(Watched(), port=0, inline_below_ms=1e9) as handle, PolicyClient(port=handle.port) as client:
        found = [client.infer(request)["actions"] for request in (short, short, long, long, short)]
        with PolicyClient(port=handle.port) as other:
            found += [one.infer(request)["actions"] for request in (long, short) for one in (client, other)]
    worker, loop = "vivace-inference", "vivace-serving"
    assert [name for name, _ in seen] == [worker, loop, loop, loop, loop, *[worker] * 4]
    assert [new > 0 for _, new in seen] == [False, False, True, *[False] * 6]
    expected = {id(request): policy.infer(request).actions for request in (short, long)}
    order = (short, short, long, long, short, long, long, short, short)
    assert all(np.array_equal(one, expected[id(request)]) for one, request in zip(found, order, strict=True))
    assert not np.array_equal(*expected.values())
