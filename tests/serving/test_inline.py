"""Which thread computes: the event loop for the only client of a quick policy, else the worker. Decision 0012."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from vivace.errors import ConfigError
from vivace.serving import serve_in_thread, thread
from vivace.serving.options import ServerOptions
from vivace.types import ActionChunk

ALWAYS = 1e9
"""So that a machine that is busy elsewhere does not send answers to the worker."""


def quick(policy: Any) -> tuple[Any, list[str]]:
    """The policy, which says that it is quick, and the names of the threads that will compute."""
    ran: list[str] = []
    infer = policy.infer

    def watched(request: Mapping[str, Any]) -> ActionChunk:
        ran.append(threading.current_thread().name)
        return infer(request)

    policy.infer, policy.quick = watched, True
    return policy, ran


def fails_at(policy: Any, key: str, error: BaseException) -> None:
    """Let the policy raise `error` for requests that have this key."""
    answers = policy.infer

    def infer(request: Mapping[str, Any]) -> ActionChunk:
        chunk: ActionChunk = answers(request)
        if key in request:
            raise error
        return chunk

    policy.infer = infer


def test_the_only_client_is_answered_on_the_event_loop(digest_policy: Any, open_client: Callable[..., Any]) -> None:
    expected = digest_policy.infer({"n": 3}).actions
    policy, ran = quick(digest_policy)
    with serve_in_thread(policy, inline_below_ms=ALWAYS) as handle:
        client = open_client(handle.port)
        assert np.array_equal([client.ask({"n": 3})["actions"] for _ in range(4)], [expected] * 4)
    assert ran == ["vivace-inference", *["vivace-serving"] * 3]


def test_a_second_client_sends_everybody_to_the_worker(
    digest_policy: Any, open_client: Callable[..., Any], wait_until: Any, counted: Any
) -> None:
    policy, ran = quick(digest_policy)
    with serve_in_thread(policy, inline_below_ms=ALWAYS) as handle:
        first, second = open_client(handle.port), open_client(handle.port)
        for client in (first, second, first, second):
            client.ask({})
        assert set(ran) == {"vivace-inference"}
        second.socket.close()
        wait_until(lambda: counted(handle.port, "vivace_connections") == 1)
        first.ask({})
    assert ran[4:] == ["vivace-serving"]


def test_a_policy_that_does_not_say_so_is_not_quick(digest_policy: Any, open_client: Callable[..., Any]) -> None:
    policy, ran = quick(digest_policy)
    policy.quick = False
    with serve_in_thread(policy, inline_below_ms=ALWAYS) as handle:
        client = open_client(handle.port)
        for _ in range(3):
            client.ask({})
    assert set(ran) == {"vivace-inference"}


@pytest.mark.parametrize("limit_ms", [0.0, 1e-6])
def test_answers_that_take_too_long_go_to_the_worker(
    digest_policy: Any, open_client: Callable[..., Any], limit_ms: float
) -> None:
    policy, ran = quick(digest_policy)
    with serve_in_thread(policy, inline_below_ms=limit_ms) as handle:
        client = open_client(handle.port)
        for _ in range(3):
            client.ask({})
    assert set(ran) == {"vivace-inference"}


def test_a_worker_that_still_runs_for_a_client_that_left_is_not_joined(
    gated_policy: Any, open_client: Callable[..., Any], wait_until: Any, counted: Any
) -> None:
    """Two inferences at once, one on each thread, would break `infer`'s contract."""
    gated_policy.quick = True
    with serve_in_thread(gated_policy, inline_below_ms=ALWAYS) as handle:
        gone, stays = open_client(handle.port), open_client(handle.port)
        gated_policy.release()
        stays.ask({"name": "first"})
        gone.send({"name": "gone"})
        assert [gated_policy.next_started() for _ in range(2)] == ["first", "gone"]
        gone.abort()
        wait_until(lambda: counted(handle.port, "vivace_connections") == 1)
        stays.send({"name": "second"})
        wait_until(lambda: handle.waiting == 1)  # in the worker's line, and the loop lives
        gated_policy.release(2)
        stays.answer()
    assert len(set(gated_policy.threads[1:])) == 1


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_error_on_the_event_loop_is_told_and_ends_only_its_connection(
    digest_policy: Any, open_client: Callable[..., Any], error: BaseException
) -> None:
    policy, ran = quick(digest_policy)
    fails_at(policy, "bad", error)
    with serve_in_thread(policy, inline_below_ms=ALWAYS) as handle:
        client = open_client(handle.port)
        client.ask({})
        client.send({"bad": 1})
        assert client.socket.recv(timeout=20).startswith(type(error).__name__)
        assert open_client(handle.port).ask({})["actions"].shape == (10, 7)
    assert ran[:2] == ["vivace-inference", "vivace-serving"]


def test_a_person_who_interrupts_is_not_an_error_of_the_policy(
    digest_policy: Any, open_client: Callable[..., Any]
) -> None:
    """On a program's main thread that is how Ctrl-C arrives; here it ends the thread with the event loop."""
    policy, _ = quick(digest_policy)
    fails_at(policy, "interrupt", KeyboardInterrupt())
    seen, threading.excepthook = threading.excepthook, lambda args: None
    try:
        with serve_in_thread(policy, inline_below_ms=ALWAYS) as handle:
            client = open_client(handle.port)
            client.ask({})
            client.send({"interrupt": 1})
            handle._thread.join(20)
            assert not handle._thread.is_alive()
    finally:
        threading.excepthook = seen


def test_a_stop_leaves_an_inference_behind_that_does_not_return(
    gated_policy: Any,
    open_client: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(thread, "STOP_MARGIN_S", 0.1)
    gated_policy.quick = True
    with serve_in_thread(gated_policy, inline_below_ms=ALWAYS, shutdown_grace_s=0.2) as handle:
        client = open_client(handle.port)
        gated_policy.release()
        client.ask({"name": "quick"})
        client.send({"name": "stuck"})
        assert [gated_policy.next_started() for _ in range(2)] == ["quick", "stuck"]
    assert "left behind" in caplog.text
    gated_policy.release()
    handle._thread.join(20)
    assert not handle._thread.is_alive(), "it ends once the inference does"


def test_a_client_that_sends_ahead_does_not_keep_others_out(
    digest_policy: Any, open_client: Callable[..., Any], http_get: Any
) -> None:
    """Its requests are there before their turn, so that nothing but the server's own pause lets anybody else in."""
    policy, ran = quick(digest_policy)
    with serve_in_thread(policy, inline_below_ms=ALWAYS) as handle:
        greedy = open_client(handle.port)
        sent = 400

        def pump() -> None:
            for n in range(sent):
                greedy.send({"n": n})

        ahead = threading.Thread(target=pump)
        ahead.start()
        for _ in range(20):
            greedy.answer()
        assert http_get(handle.port, "/healthz")[0] == 200
        assert len(ran) < sent
        for _ in range(sent - 20):
            greedy.answer()
        ahead.join(20)
    assert len(ran) == sent


def test_a_limit_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="inline_below_ms"):
        ServerOptions(inline_below_ms=-1.0)
