"""The whole road: openpi's client, the wire, a checkpoint that openpi wrote, the actions that openpi itself computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from vivace import load_policy
from vivace.config import EngineConfig
from vivace.serving import serve_in_thread


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openpis_observation_gives_openpis_actions_over_the_wire(golden_dir: Path, openpi_module: Any) -> None:
    folder = golden_dir / "openpi_pytorch_pi05_fp32"
    case: dict[str, Any] = json.loads((folder / "case.json").read_text())
    recorded, wanted = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")["actions"]
    request = {key.removeprefix("obs:"): value for key, value in recorded.items() if key.startswith("obs:")}
    request |= {"prompt": case["task"], "noise": recorded["noise"]}
    policy = load_policy(
        folder / "checkpoint",
        embodiment="droid",
        tokenizer=folder / case["tokenizer"],
        horizon=case["horizon"],
        vision_heads=case["not_inferable"]["vision_heads"],
        config=EngineConfig(backend="eager", device="cpu", precision="float32"),
    )
    with serve_in_thread(policy) as server:
        client = openpi_module("websocket_client_policy").WebsocketClientPolicy("127.0.0.1", server.port)
        result = client.infer(request)
        changed = client.infer({**request, "observation/joint_position": request["observation/joint_position"] + 0.3})
        again = client.infer(request)
        metadata = client.get_server_metadata()
        client._ws.close()
    assert metadata["vivace"] == json.loads(json.dumps(policy.engine.to_json(), default=str))
    scale = np.abs(wanted).max()
    assert np.abs(result["actions"] - wanted).max() <= 1e-5 * scale
    np.testing.assert_array_equal(result["actions"], policy.infer(request).actions)
    np.testing.assert_array_equal(result["actions"], again["actions"])  # nothing is left of the request between
    assert np.abs(changed["actions"] - wanted).max() > 1e-3 * scale  # control: another state, other actions
    timing = result["policy_timing"]
    assert timing["infer_ms"] == pytest.approx(timing["vision_ms"] + timing["prefix_ms"] + timing["denoise_ms"])
    assert timing["infer_ms"] < result["server_timing"]["infer_ms"]
