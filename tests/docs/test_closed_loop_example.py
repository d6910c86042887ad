"""examples/closed_loop_with_openpi_client.py: what a robot sends is what the policy reads, a wrong answer is seen."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vivace
from vivace.robots.conveyor import embodiment
from vivace.serving import serve_in_thread
from vivace.sim.arms import Arm, Delay
from vivace.sim.conveyor import ConveyorEnv
from vivace.sim.tasks import task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = replace(task("conveyor"), max_ticks=20)
ARMS = [Arm("conveyor", policy="conveyor-small", delay=Delay(name, (n,))) for name, n in (("0 ms", 0), ("100 ms", 5))]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own use of its websocket library


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("openpi_client")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("closed_loop_example", EXAMPLES / "closed_loop_with_openpi_client.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy():
    return vivace.load_policy("conveyor-small", embodiment="conveyor")


@pytest.fixture
def env():
    environment = ConveyorEnv(SHORT, image_px=96)
    yield environment
    environment.close()


def test_a_look_becomes_the_request_of_the_embodiment(example, policy, env):
    env.reset(seed=3)
    seen = env.look()
    request, robot = example.as_sent(seen), embodiment("pi05")
    assert set(request) == {camera.key for camera in robot.cameras} | {part.key for part in robot.state} | {"prompt"}
    direct, sent = policy.prepare(seen), policy.prepare(request)
    assert np.array_equal(direct.images, sent.images), "each camera in its own place"
    assert np.array_equal(direct.tokens, sent.tokens)


def test_episodes_over_the_wire_are_those_of_the_policy_alone(example, policy, env, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve_in_thread(policy) as server:
        client = example.WebsocketClientPolicy(host="127.0.0.1", port=server.port)
        robot, engine = example.Robot(client, keep_every=2), client.get_server_metadata()["vivace"]
        rows = example.play(robot, env, ARMS, seeds=range(1), engine=engine)
        client._ws.close()
    assert [row["age_ms"]["max"] for row in rows] == [140.0, 240.0], "8 ticks executed; and 5 ticks later"
    assert len(robot.round_trip_ms) == 3 + 3, "looks at 0, 8, 16 in each arm"
    assert len(robot.kept) == 3
    found = example.document(robot, rows, wrong=example.differing(robot.kept, policy), seeds=range(1), engine=engine)
    assert found["answers"] == {"received": 6, "compared": 3, "differing": 0}
    assert found["passed"]


def test_one_wrong_number_in_one_answer_is_found(example, policy, env):
    class OnceWrong:
        calls = 0

        def infer(self, request):
            self.calls += 1
            actions = policy.infer(request).actions.copy()
            if self.calls == 2:
                actions[7, 2] = np.nextafter(actions[7, 2], np.inf, dtype=actions.dtype)  # the last bit
            return {"actions": actions, "policy_timing": {"infer_ms": 1.0}}

    robot = example.Robot(OnceWrong(), keep_every=1)
    rows = example.play(robot, env, ARMS[:1], seeds=range(1), engine={})
    wrong = example.differing(robot.kept, policy)
    assert wrong == 1
    assert not example.document(robot, rows, wrong=wrong, seeds=range(1), engine={})["passed"]
