"""Boundary B3: a client in another process, its bits and its errors."""

import subprocess
import threading
import time

import numpy as np
import pytest

from vivace.check import hopper_client, hopper_served
from vivace.config import ResolvedEngine
from vivace.errors import ObservationError, ServerError
from vivace.serving import client as ours
from vivace.serving.protocol import unpack
from vivace.serving.thread import serve_in_thread
from vivace.types import ActionChunk

REQUEST = {"image": np.zeros((4, 4, 3), np.uint8), "prompt": "push"}
ENGINE = ResolvedEngine(
    backend="eager", device="cpu", precision="float32", num_denoise_steps=1, seed=0, checkpoint="none",
    policy_kind="pi05", horizon=5, action_dim=3, flavour="openpi_torch", version="0",
)  # fmt: skip


class Answers:
    """A policy that takes 5 ms and gives these answers in turn, the last one for ever."""

    metadata, engine = {}, ENGINE

    def __init__(self, *values, refuses_after=10**9, quick=False):
        self.values, self.asked, self.refuses_after, self.quick = list(values), [], refuses_after, quick
        self.threads = []

    def infer(self, request):
        self.asked.append(request)
        self.threads.append(threading.current_thread().name)
        if len(self.asked) > self.refuses_after:
            raise ObservationError("no text")
        time.sleep(0.005)
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        actions = np.full((5, 3), value, np.float32)
        return ActionChunk(
            actions=actions, actions_normalized=actions, t_obs=0.0, control_hz=20.0, milliseconds={"total": 5.0},
            engine=ENGINE,
        )  # fmt: skip

    def warmup(self):
        pass


@pytest.mark.parametrize("client", hopper_client.CLIENTS)
def test_round_trips_hold_the_inference_and_every_answer_is_compared(client, openpi_module):
    if client == "openpi":
        openpi_module("websocket_client_policy")
    steady, other = Answers(1.0), Answers(*[1.0] * 4, *range(2, 100))
    alone = {"steady": np.ones((5, 3), np.float32), "other": np.ones((5, 3), np.float32)}
    found = hopper_served.round_trips({"steady": steady, "other": other}, REQUEST, alone, calls=3, client=client)
    times, same = found["steady"]
    assert len(times.total_ms) == len(times.stages_ms["server"]) == 3
    assert all(5.0 <= server < whole for server, whole in zip(times.stages_ms["server"], times.total_ms, strict=True))
    assert same == {"same": 3, "of": 3}
    assert found["other"][1] == {"same": 0, "of": 3}, "steady or not: not what its policy alone answers"
    assert len(steady.asked) == 1 + 1 + times.warmup_calls + 3, "rehearsed once, then cold, warm-up, samples"
    sent = steady.asked[-1]
    assert sent["prompt"] == "push"
    assert np.array_equal(sent["image"], REQUEST["image"])


@pytest.mark.parametrize("client", hopper_client.CLIENTS)
def test_quick_policies_are_served_as_they_are_to_robots(client, openpi_module):
    if client == "openpi":
        openpi_module("websocket_client_policy")
    policies = {"quick": Answers(1.0, quick=True), "not": Answers(1.0)}
    alone = dict.fromkeys(policies, np.ones((5, 3), np.float32))
    hopper_served.round_trips(policies, REQUEST, alone, calls=3, client=client)
    assert "vivace-serving" in policies["quick"].threads, "the event loop's"
    assert set(policies["not"].threads) == {"vivace-inference"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # openpi's use of its websocket library
@pytest.mark.parametrize("client", hopper_client.CLIENTS)
def test_the_client_that_is_named_asks(client, monkeypatch, openpi_module):
    """Rows of one must never be the other's."""
    theirs, asked = openpi_module("websocket_client_policy"), []
    classes = {"vivace": (ours, "PolicyClient"), "openpi": (theirs, "WebsocketClientPolicy")}
    for name, (module, made) in classes.items():
        real = getattr(module, made)
        monkeypatch.setattr(module, made, lambda *a, name=name, real=real: asked.append(name) or real(*a))
    with serve_in_thread(Answers(1.0)) as server:
        hopper_client.asked({"one": server.url}, REQUEST, {"one": 0}, calls=1, seed=0, client=client)
    assert asked == [client]
    questions, run = [], subprocess.run
    monkeypatch.setattr(
        hopper_served.subprocess, "run", lambda *a, **k: questions.append(unpack(k["input"])) or run(*a, **k)
    )
    hopper_served.round_trips({"one": Answers(1.0)}, REQUEST, {"one": 0}, calls=1, client=client)
    assert [one["client"] for one in questions] == [client]


def test_a_client_that_fails_says_why():
    with pytest.raises(subprocess.SubprocessError, match="no text"):
        hopper_served.round_trips({"one": Answers(1.0, refuses_after=1)}, REQUEST, {}, calls=1)


def test_a_server_that_answers_with_an_error_stops_the_client():
    with serve_in_thread(Answers(1.0, refuses_after=3)) as server, pytest.raises(ServerError, match="no text"):
        hopper_client.asked({"one": server.url}, REQUEST, {"one": 0}, calls=9, seed=0)


def test_without_websockets_it_is_not_run(monkeypatch):
    assert hopper_served.why_not() is None
    monkeypatch.setattr(hopper_served.importlib.util, "find_spec", lambda name: None)
    assert hopper_served.why_not() == "websockets not installed"
    assert hopper_served.why_not("openpi") == "websockets and openpi_client not installed"
