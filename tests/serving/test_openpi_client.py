"""The unmodified client package that robots already run, against our server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest

from vivace.serving import ServerHandle, serve_in_thread

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own use of its websocket library

OBSERVATION = {
    "observation/exterior_image_1_left": np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3),
    "observation/wrist_image_left": np.zeros((24, 32, 3), np.uint8),
    "observation/joint_position": np.linspace(-1, 1, 7),
    "observation/gripper_position": np.zeros(1),
    "prompt": "pick up the marker é",
}


@pytest.fixture
def openpi(openpi_module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes clients and closes what the client class itself has no method to close."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client_class = openpi_module("websocket_client_policy").WebsocketClientPolicy
    made: list[Any] = []

    def make(port: int, **options: Any) -> Any:
        made.append(client_class(host="127.0.0.1", port=port, **options))
        return made[-1]

    yield make
    for client in made:
        client._ws.close()


def test_it_is_the_released_package(openpi_module: Any) -> None:
    openpi_module("base_policy")
    assert version("openpi-client") == "0.1.2"


def test_metadata_and_actions(server: ServerHandle, digest_policy: Any, openpi: Any) -> None:
    client = openpi(server.port)
    assert client.get_server_metadata()["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    assert client.get_server_metadata()["vivace"]["policy_kind"] == "pi05"
    client.reset()
    for _ in range(3):
        result = client.infer(OBSERVATION)
        np.testing.assert_array_equal(result["actions"], digest_policy.infer(OBSERVATION).actions)
    assert result["server_timing"]["prev_total_ms"] > 0
    assert result["policy_timing"]["infer_ms"] == 6.5


def test_the_observation_arrives_bit_for_bit(server: ServerHandle, digest_policy: Any, openpi: Any) -> None:
    """The digest covers every byte, so the order in memory and one changed pixel both show."""
    client = openpi(server.port)
    key = "observation/exterior_image_1_left"
    fortran = {**OBSERVATION, key: np.asfortranarray(OBSERVATION[key])}
    changed = {**OBSERVATION, key: OBSERVATION[key].copy()}
    changed[key][3, 4, 1] ^= 1
    wanted = digest_policy.infer(OBSERVATION).actions
    np.testing.assert_array_equal(client.infer(fortran)["actions"], wanted)
    assert not np.array_equal(client.infer(changed)["actions"], wanted)


def test_the_action_chunk_broker_hands_out_one_action_per_tick(
    server: ServerHandle, digest_policy: Any, openpi: Any, openpi_module: Any, counted: Any
) -> None:
    """It slices every array of the result by time: any array without a time axis would break it here."""
    broker_class = openpi_module("action_chunk_broker").ActionChunkBroker
    broker = broker_class(openpi(server.port), action_horizon=10)
    wanted = digest_policy.infer(OBSERVATION).actions
    for tick in range(25):
        result = broker.infer(OBSERVATION)
        np.testing.assert_array_equal(result["actions"], wanted[tick % 10])
        assert type(result["policy_timing"]["infer_ms"]) is float
    assert counted(server.port, "vivace_requests_total") == 3


def test_an_error_becomes_its_runtime_error(server: ServerHandle, openpi: Any) -> None:
    client = openpi(server.port)
    with pytest.raises(RuntimeError, match="Error in inference server:\nValueError: no wrist camera"):
        client.infer({"raise": "no wrist camera"})
    assert openpi(server.port).infer(OBSERVATION)["actions"].shape == (10, 7)


def test_its_api_key(digest_policy: Any, openpi: Any) -> None:
    with serve_in_thread(digest_policy, api_key="s3cret") as handle:
        assert openpi(handle.port, api_key="s3cret").infer(OBSERVATION)["actions"].shape == (10, 7)
        with pytest.raises(Exception, match="401"):
            openpi(handle.port, api_key="wrong")
        with pytest.raises(Exception, match="401"):
            openpi(handle.port)
