"""`vivace serve` as a process: its ready line, its signals, its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

SCRIPT = """
import sys, threading
from pathlib import Path
import numpy as np
from vivace.cli.main import main
from vivace.config import ResolvedEngine
from vivace.runtime import policy as module
from vivace.types import ActionChunk

class Gated:
    engine = ResolvedEngine("eager", "cpu", "float32", 10, 0, "x", "pi05", 10, 7, "lerobot", "0")
    metadata = {"robot": "test"}
    gate = threading.Semaphore(0)
    quick = "quick" in sys.argv[-1]
    def warmup(self):
        print("warm", file=sys.stderr)
    def infer(self, request):
        where = "loop" if threading.current_thread() is threading.main_thread() else "worker"
        print("started", request["prompt"], "on the", where, file=sys.stderr, flush=True)
        if request["prompt"] == "long":
            threading.Thread(target=lambda: (sys.stdin.readline(), self.gate.release()), daemon=True).start()
            self.gate.acquire()
        return ActionChunk(np.ones((10, 7)), np.zeros((10, 32), np.float32), None, 0.0, {"total": 1.0}, self.engine)

def load_policy(path, **options):
    print("loaded", path.name, {k: str(v) for k, v in options.items()}, file=sys.stderr)
    return Gated()

module.load_policy = load_policy
sys.exit(main(["serve", *sys.argv[1:]]))
"""


class Process:
    """The server process with its output."""

    def __init__(self, folder: Path, *args: str) -> None:
        script = folder / "serve.py"
        script.write_text(textwrap.dedent(SCRIPT))
        self.log = folder / "stderr.txt"
        self.inner = subprocess.Popen(
            [sys.executable, str(script), "checkpoint", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ready(self) -> dict[str, Any]:
        assert self.inner.stdout is not None
        line = self.inner.stdout.readline()
        assert line, self.log.read_text()
        event: dict[str, Any] = json.loads(line)
        return event


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start_(*args: str) -> Process:
        started.append(Process(tmp_path, *args))
        return started[-1]

    yield start_
    for process in started:
        process.inner.kill()
        process.inner.wait()
        for pipe in (process.inner.stdin, process.inner.stdout):
            assert pipe is not None
            pipe.close()


def test_ready_line_answer_and_clean_stop(start: Any, open_client: Any, wait_until: Any) -> None:
    process = start("--port", "0", "--embodiment", "droid", "--precision", "float32", "--default-prompt", "tidy up")
    event = process.ready()
    assert (event["event"], event["host"]) == ("listening", "127.0.0.1")
    assert event["engine"]["backend"] == "eager"
    client = open_client(event["port"])
    assert client.metadata["robot"] == "test"
    assert client.ask({"prompt": "short"})["actions"].shape == (10, 7)
    client.send({"prompt": "long"})
    wait_until(lambda: "started long" in process.log.read_text())
    process.inner.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping" in process.log.read_text())
    process.inner.stdin.write("go on\n")
    process.inner.stdin.flush()
    assert client.answer()["actions"].shape == (10, 7)
    with pytest.raises(ConnectionClosed) as closed:
        client.socket.recv(timeout=20)
    assert closed.value.rcvd.code == 1001
    assert process.inner.wait(20) == 0
    log = process.log.read_text()
    assert f"listening on ws://127.0.0.1:{event['port']}" in log
    assert "Traceback" not in log
    assert log.index("loaded checkpoint") < log.index("warm") < log.index("listening on ws://")
    for option in ("'embodiment': 'droid'", "'default_prompt': 'tidy up'", "num_denoise_steps=None"):
        assert option in log
    assert "precision='float32'" in log


def test_a_second_signal_cuts(start: Any, open_client: Any, wait_until: Any) -> None:
    process = start("--port", "0")
    client = open_client(process.ready()["port"])
    client.send({"prompt": "long"})
    wait_until(lambda: "started long" in process.log.read_text())
    process.inner.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in process.log.read_text())
    assert process.inner.poll() is None
    process.inner.send_signal(signal.SIGINT)
    with pytest.raises(ConnectionClosed):
        client.socket.recv(timeout=20)
    assert process.inner.wait(20) == 0
    assert "Traceback" not in process.log.read_text()


def test_bad_use_exits_with_2(start: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("\n")
    process = start("--port", "0", "--api-key-file", str(key))
    assert process.inner.wait(60) == 2
    assert "api key cannot be used" in process.log.read_text()


@pytest.mark.parametrize(("limit", "where"), [("1e9", "loop"), ("0", "worker")])
def test_answers_on_the_event_loop_can_be_switched_off(start: Any, open_client: Any, limit: str, where: str) -> None:
    process = start("--port", "0", "--inline-below-ms", limit, "--default-prompt", "quick")
    client = open_client(process.ready()["port"])
    for prompt in ("first", "second"):
        client.ask({"prompt": prompt})
    assert f"started second on the {where}" in process.log.read_text()


@pytest.mark.parametrize(("option", "value"), [("--inline-below-ms", "-1"), ("--port", "70000")])
def test_options_that_cannot_be_used_are_refused_before_loading(start: Any, option: str, value: str) -> None:
    process = start(option, value)
    assert process.inner.wait(60) == 2
    said = process.log.read_text()
    assert "cannot be used" in said
    assert "loaded" not in said
