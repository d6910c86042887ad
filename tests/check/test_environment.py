"""The environment report must survive whatever it looks at."""

import json
import os
import subprocess
import sys

from vivace.check import environment


def test_facts_are_plain_json_and_name_the_machine():
    facts = environment.collect()
    json.dumps(facts, allow_nan=False)
    assert facts["cpu"]["cores_usable"] >= 1
    assert facts["packages"]["torch"]
    assert facts["torch"]["version"]
    assert facts["python"].count(".") == 2
    assert set(facts["state"]) == {"time_s", "load_1m", "cpu_mhz", "governor", "gpus"}


def test_torch_is_asked_where_it_runs_and_in_a_child_where_it_does_not(monkeypatch):
    code = "import json, sys; from vivace.check import environment; print(json.dumps(environment.collect()['torch']))"
    command = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    from_child = json.loads(done.stdout)
    import torch

    asked = []
    monkeypatch.setattr(environment, "probe", lambda code: asked.append(code) or {})
    here = environment.collect()["torch"]
    assert not asked, "torch is here already: importing it again costs seconds"
    assert here == {**from_child, "threads": torch.get_num_threads()}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    environment.collect()
    assert len(asked) == 1, "a GPU that this process has not used is asked in a child, which may hang"

    def gone() -> bool:
        raise RuntimeError("the driver went away")

    monkeypatch.setattr(torch.cuda, "is_available", gone)
    assert environment.collect()["torch"] == {"error": "RuntimeError: the driver went away"}


def test_importing_it_imports_no_library():
    code = "import sys, vivace.check.environment; print(sorted({'torch', 'numpy', 'rich', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_probe_that_raises_crashes_or_babbles_costs_one_line():
    assert environment.probe("raise RuntimeError('bad build')") == {"error": "RuntimeError: bad build"}
    assert "error" in environment.probe("import os; os.abort()")
    assert environment.probe("print('hello')") == {"error": "the probe printed no JSON"}
    assert environment.probe("pass") == {"error": "the probe printed no JSON"}
    assert environment.probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}


def test_a_probe_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(environment, "CHILD_TIMEOUT_S", 0.5)
    assert "no answer in 0.5 s" in environment.probe("import time; time.sleep(60)")["error"]


def test_broken_imports_are_found_and_named(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os\nos.abort()\n")
    (tmp_path / "noisy.py").write_text("print('hello from a library')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    modules = {
        "a": "json",
        "gone": "no_such_module",
        "b": "noisy",
        "c": "crashes",
        "d": "math",
        "last": "also_not_there",
    }
    found = environment.broken_imports(modules)
    assert set(found) == {"gone", "c", "last"}
    assert "no_such_module" in found["gone"]
    assert environment.broken_imports({"a": "json"}) == {}


def test_backends_are_asked_one_by_one():
    found = environment.backends()
    assert found["eager"]["cpu"] is None
    assert set(found) >= {"eager", "compiled"}


def test_writable_looks_and_creates_nothing(tmp_path):
    assert environment.writable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("x")
    assert "not a folder" in environment.writable(file / "cache")


def test_nvidia_smi_is_parsed(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    rows = environment.nvidia_smi("name,driver_version")
    assert rows == [{"name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1"}]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.nvidia_smi("name") == []


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None
