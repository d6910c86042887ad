"""Drive a policy server with openpi's own client, as a robot would, and compare every answer with the policy alone.

    python examples/drive_with_openpi_client.py CHECKPOINT --frames 50 -o drive.json

Starts `vivace serve CHECKPOINT` on a free port of this machine, waits until it listens, sends made-up camera frames through
the unmodified `openpi-client` from PyPI, and stops the server by its own handle.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from server_process import served

import vivace
from vivace.check import environment, observations, results


def drive(checkpoint: Path, frames: int) -> dict[str, Any]:
    """Send `frames` observations; returns round-trip times and how far the answers are from the policy alone."""
    policy = vivace.load_policy(checkpoint)
    requests = observations.synthetic(policy.io, frames, seed=7, prepare=policy.prepare)
    round_trip_ms, model_ms, differing = [], [], 0
    with served(checkpoint) as port:
        client = WebsocketClientPolicy(host="127.0.0.1", port=port)
        metadata = client.get_server_metadata()
        for request in requests:
            start = time.perf_counter()
            answer = client.infer(request)
            round_trip_ms.append((time.perf_counter() - start) * 1e3)
            model_ms.append(answer["policy_timing"]["infer_ms"])
            differing += not np.array_equal(answer["actions"], policy.infer(request).actions)
    return {
        "frames": frames,
        "answers_that_differ_from_the_policy_alone": differing,
        "action_chunk": f"{answer['actions'].shape[0]} x {answer['actions'].shape[1]}",
        "round_trip_p50_ms": round(float(np.median(round_trip_ms)), 2),
        "round_trip_p95_ms": round(float(np.percentile(round_trip_ms, 95)), 2),
        "round_trip_max_ms": round(max(round_trip_ms), 2),
        "model_p50_ms": round(float(np.median(model_ms)), 2),
        "boundary": "B3: websocket round trip on this machine, openpi-client in another process than the server",
        "engine": metadata["vivace"],
    }


def main() -> int:
    """Command line; exit code 1 if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    found = drive(args.checkpoint, args.frames)
    document = results.result("serve-drive", found, environment=environment.collect())
    text = json.dumps(document, indent=1)
    if args.output:
        args.output.write_text(text)
    shown = {key: value for key, value in found.items() if key != "engine"}
    print(json.dumps(shown, indent=1), file=sys.stderr)
    return int(found["answers_that_differ_from_the_policy_alone"] > 0)


if __name__ == "__main__":
    sys.exit(main())
