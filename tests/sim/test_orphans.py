"""A killed program leaves no worker behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

PROGRAMS = {
    "campaign": """
import os, sys, time
from vivace.sim.campaign import run_jobs

def busy(job):
    print(os.getpid(), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    list(run_jobs([0, 1], processes=2, run=busy))
""",
    "record": """
import os, sys, time
from vivace.sim import record

def busy(plan, job):
    print(os.getpid(), flush=True)
    time.sleep(120)

record._run_in_process = busy
if __name__ == "__main__":
    list(record.record(record.Plan((record.Source("static", 2),)), processes=2))
""",
}


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_workers_end_with_a_program_that_is_killed(name, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAMS[name])
    program = subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, text=True)
    workers = []
    try:
        workers = [int(program.stdout.readline()) for _ in range(2)]
        assert len({*workers, program.pid}) == 3
        assert all(alive(pid) for pid in workers)
        program.kill()
        program.wait()
        for _ in range(100):
            if not any(alive(pid) for pid in workers):
                break
            time.sleep(0.1)
        assert not any(alive(pid) for pid in workers)
    finally:
        program.kill()
        for pid in workers:
            if alive(pid):
                os.kill(pid, 9)
        program.stdout.close()
        program.wait()


@pytest.mark.parametrize("own", [None, "3"])
def test_a_worker_draws_with_one_thread_unless_the_user_says_otherwise(own, tmp_path):
    file = tmp_path / "program.py"
    file.write_text("""
import os
from vivace.sim.campaign import run_jobs

def threads(job):
    return os.environ["LP_NUM_THREADS"]

if __name__ == "__main__":
    print(*run_jobs([0, 1], processes=2, run=threads))
""")
    variables = {name: value for name, value in os.environ.items() if name != "LP_NUM_THREADS"}
    variables |= {} if own is None else {"LP_NUM_THREADS": own}
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, timeout=120, check=True, env=variables
    )
    assert done.stdout.split() == [own or "1"] * 2
