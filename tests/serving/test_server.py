"""What one client sees: metadata, results, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from vivace.errors import ObservationError, ProtocolError
from vivace.serving import PolicyServer, ServerHandle, pack, serve_in_thread
from vivace.serving.session import ERROR_REASON

REQUEST = {"observation/state": np.arange(7.0), "prompt": "fold the towel"}


def failure(client: Any) -> tuple[str, int, str]:
    """The error frame and the close that follow a bad request."""
    text = client.socket.recv(timeout=20)
    assert isinstance(text, str)
    with pytest.raises(ConnectionClosed) as closed:
        client.socket.recv(timeout=20)
    return text, closed.value.rcvd.code, closed.value.rcvd.reason


def test_metadata_comes_first_and_names_the_engine(server: ServerHandle, open_client: Callable[..., Any]) -> None:
    metadata = open_client(server.port).metadata
    assert metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    assert metadata["vivace"]["backend"] == "eager"
    assert metadata["vivace"]["details"] == {"buckets": [16, 32]}
    assert set(metadata) == {"reset_pose", "vivace"}


def test_metadata_given_to_the_server_is_added(digest_policy: Any, open_client: Callable[..., Any]) -> None:
    with serve_in_thread(digest_policy, metadata={"robot": "left arm", "reset_pose": [1]}) as handle:
        metadata = open_client(handle.port).metadata
    assert metadata["robot"] == "left arm"
    assert metadata["reset_pose"] == [1]


def test_metadata_that_no_client_could_read_is_refused(digest_policy: Any) -> None:
    with pytest.raises(ProtocolError):
        PolicyServer(digest_policy, metadata={"limits": {1: 2}})


def test_a_result_is_openpis_dict(server: ServerHandle, digest_policy: Any, open_client: Callable[..., Any]) -> None:
    client = open_client(server.port)
    first, second = client.ask(REQUEST), client.ask(REQUEST)
    wanted = digest_policy.infer(REQUEST).actions
    for result in (first, second):
        assert set(result) == {"actions", "policy_timing", "server_timing"}
        assert result["actions"].dtype == np.float64
        np.testing.assert_array_equal(result["actions"], wanted)
        assert result["policy_timing"]["infer_ms"] == 6.5  # vision 2 + prefix 3 + denoise 1.5, not the total 9
        assert result["policy_timing"]["total_ms"] == 9.0
        assert all(type(value) is float for value in result["policy_timing"].values())
        assert type(result["server_timing"]["infer_ms"]) is float
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] > 0


def test_the_previous_duration_belongs_to_the_connection(server: ServerHandle, open_client: Callable[..., Any]) -> None:
    open_client(server.port).ask(REQUEST)
    assert "prev_total_ms" not in open_client(server.port).ask(REQUEST)["server_timing"]


def test_model_time_is_the_total_where_stages_are_unknown() -> None:
    from vivace.serving.results import policy_timing

    assert policy_timing({"total": 5.0, "vision": 1.0}) == {"infer_ms": 5.0, "total_ms": 5.0, "vision_ms": 1.0}
    assert policy_timing({}) == {}


def test_an_error_is_told_and_ends_only_its_connection(server: ServerHandle, open_client: Callable[..., Any]) -> None:
    bad, good = open_client(server.port), open_client(server.port)
    bad.send({"raise": "the wrist camera is missing"})
    text, code, reason = failure(bad)
    assert text == "ValueError: the wrist camera is missing"
    assert (code, reason) == (1011, ERROR_REASON)
    assert reason == "Internal server error. Traceback included in previous frame."
    assert good.ask(REQUEST)["actions"].shape == (10, 7)
    assert open_client(server.port).ask(REQUEST)["actions"].shape == (10, 7)


def test_an_error_says_what_got_wanted_do(digest_policy: Any, open_client: Callable[..., Any]) -> None:
    def infer(request: Any) -> Any:
        raise ObservationError("state has the wrong size", got=6, wanted=7, do="send 7 numbers")

    digest_policy.infer = infer
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        client.send(REQUEST)
        assert failure(client)[0] == "ObservationError: state has the wrong size; got 6; wanted 7; send 7 numbers"


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_sent_only_when_asked_for(digest_policy: Any, open_client: Any, debug: bool) -> None:
    with serve_in_thread(digest_policy, debug=debug) as handle:
        client = open_client(handle.port)
        client.send({"raise": "x"})
        assert ("Traceback" in failure(client)[0]) is debug


@pytest.mark.parametrize(
    "error", [SystemExit("leave"), KeyboardInterrupt(), GeneratorExit(), StopIteration(), MemoryError()]
)
def test_nothing_that_a_policy_raises_ends_the_worker(digest_policy: Any, open_client: Any, error: Any) -> None:
    answers = digest_policy.infer

    def infer(request: Any) -> Any:
        if "bad" in request:
            raise error
        return answers(request)

    digest_policy.infer = infer
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        client.send({"bad": 1})
        assert failure(client)[0].startswith(type(error).__name__)
        assert open_client(handle.port).ask(REQUEST)["actions"].shape == (10, 7)


@pytest.mark.parametrize(
    ("actions", "name"),
    [
        (np.full((10, 7), np.nan), "NumericsError"),
        (np.array([[0.0, np.inf]]), "NumericsError"),
        (np.zeros(7), "ShapeError"),
        (np.zeros((10, 7), int), "ShapeError"),
    ],
)
def test_unusable_actions_never_reach_a_robot(digest_policy: Any, open_client: Any, actions: Any, name: str) -> None:
    from dataclasses import replace

    answers = digest_policy.infer
    digest_policy.infer = lambda request: replace(answers(request), actions=actions)
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        client.send(REQUEST)
        assert failure(client)[0].startswith(name)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"", "ends too early"),
        (b"\xc1", "does not have"),
        (pack([1, 2]), "not a map"),
        (pack(None), "not a map"),
        (pack(np.zeros(3)), "not a map"),
        (pack({b"bytes": 1}), "not text"),
        ("text", "text frame"),
    ],
)
def test_a_bad_frame_is_a_protocol_error(
    server: ServerHandle, open_client: Any, frame: bytes | str, words: str
) -> None:
    client = open_client(server.port)
    client.socket.send(frame)
    text, code, _ = failure(client)
    assert text.startswith("ProtocolError: ")
    assert words in text
    assert code == 1011
