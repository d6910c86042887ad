"""How long a robot waits for a server that reads a checkpoint from files: from process start to the first answer.

    vivace make-checkpoint full-size --size full --dtype bfloat16 --cameras front wrist side
    python benchmarks/start_probe.py full-size -o start.json -- --backend cuda_graph --precision plan.json

Each start is a `vivace serve` process of its own with what follows `--`. The first finds no compiled kernels (its caches are
an empty folder, but for CUDA's own), the others do. The port opens when every bucket is warm. What this does not show is a
slow disk: files that were just written or read are in the host's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vivace.check import environment, observations, targets
from vivace.check.results import result, write_result
from vivace.checkpoints.open import open_checkpoint
from vivace.robots.io import resolve
from vivace.serving import PolicyClient

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VIVACE_CACHE")
LONGEST_S = 300.0


def request_for(folder: Path) -> dict[str, Any]:
    """A made-up observation that this checkpoint's robot could send."""
    checkpoint = open_checkpoint(folder)
    model = checkpoint.model
    io = resolve(
        checkpoint.robot, model.kind, image_size=model.vision.image_size, action_width=model.action_width,
        vocab_size=model.vocab_size,
    )  # fmt: skip
    return observations.synthetic(io, 1)[0]


def one_start(folder: Path, options: list[str], request: Mapping[str, Any], caches: Path) -> dict[str, Any]:
    """Seconds from process start until it listens and until the first answer, that answer, and what ran."""
    own = dict(os.environ) | {name: str(caches / name) for name in CACHES}
    command = [sys.executable, "-m", "vivace.cli.main", "serve", str(folder), "--port", "0", *options]
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=said, text=True)
        late = threading.Timer(LONGEST_S, server.kill)
        late.start()
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                said.seek(0)
                raise SystemExit(f"the server did not start:\n{said.read().decode()[-2000:]}")
            listening, event = time.perf_counter() - begin, json.loads(line)
            with PolicyClient(port=event["port"]) as client:
                answer = client.infer(request)
                first = time.perf_counter() - begin
                again = client.infer(request)
        finally:
            late.cancel()
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            finally:
                server.kill()
                server.stdout.close()
    same = bool(np.array_equal(answer["actions"], again["actions"]))
    return {"listening_s": listening, "first_action_s": first, "same_bits": same, "engine": event["engine"],
            "actions": answer["actions"]}  # fmt: skip


def measured(folder: Path, options: list[str], *, starts: int) -> dict[str, Any]:
    """The result's body: one row for each start, the first with cold caches."""
    rows, request, first, engine = [], request_for(folder), None, {}
    with tempfile.TemporaryDirectory() as caches:
        for index in range(starts):
            row = one_start(folder, options, request, Path(caches))
            actions, engine = row.pop("actions"), row.pop("engine") | {"checkpoint": folder.name}
            first = actions if first is None else first
            state = "cold" if index == 0 else "warm"
            row["same_bits"] = row["same_bits"] and bool(np.array_equal(actions, first))
            mark = targets.of_start(state, every_bucket_s=row["first_action_s"])
            rows.append({"caches": state, **row, "targets": [mark]})
            print(f"{state}: listens after {row['listening_s']:.1f} s, first action {row['first_action_s']:.1f} s")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    passed = all(row["same_bits"] and row["targets"][0].must_met for row in rows)
    return {"options": options, "engine": engine, "weights_bytes_in_files": size, "rows": rows, "passed": passed}


def main(arguments: list[str]) -> int:
    """See the module. 0 if every start was in time and all gave the same bits."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    mine, options = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--commit", default="", help="of the code, where this copy of it has no git")
    given = parser.parse_args(mine)
    body = measured(given.folder, options, starts=given.starts)
    facts = environment.collect()
    write_result(given.out, result("start", body | {"commit": given.commit}, environment=facts))
    return 0 if body["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
