"""`vivace doctor` must work where vivace itself cannot: it is what a person runs then."""

import json
import os
import subprocess
import sys


def doctor(*arguments, broken=(), folder=None, **environment):
    """Run it in a process of its own in which the modules `broken` raise when they are imported."""
    for name in broken:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was built for another machine')\n")
    variables = {**os.environ, **environment}
    if broken:
        variables["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-m", "vivace.cli.main", "doctor", *arguments],
        capture_output=True, text=True, timeout=240, env=variables, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    document = json.loads(done.stdout)
    return done.returncode, document, {check["name"]: check for check in document["checks"]}


def test_a_healthy_machine(tmp_path):
    (tmp_path / "t.model").write_bytes(b"x")
    options = ("-o", str(tmp_path / "d.json"), "--tokenizer", str(tmp_path / "t.model"))
    code, document, checks = doctor(*options, VIVACE_CACHE=str(tmp_path / "cache"))
    assert code == 0
    assert document["healthy"] is True
    assert document["kind"] == "doctor"
    assert document == json.loads((tmp_path / "d.json").read_text())
    for name in ("system", "cpu", "memory", "python", "torch", "numpy", "backend eager", "cache folder"):
        assert checks[name]["state"] == "fine", checks[name]
    assert "runs on cpu" in checks["backend eager"]["found"]
    assert checks["tokenizer"]["state"] == "fine"
    assert not (tmp_path / "cache").exists(), "looking must not create anything"


def test_torch_that_cannot_be_imported(tmp_path):
    code, document, checks = doctor(broken=["torch"], folder=tmp_path)
    assert code == 1
    assert document["healthy"] is False
    assert checks["torch"]["state"] == "problem"
    assert "built for another machine" in checks["torch"]["found"]
    assert "pytorch.org" in checks["torch"]["do"]
    assert checks["backend eager"]["state"] == "problem"
    assert checks["numpy"]["state"] == "fine", "one broken library does not hide the others"


def test_numpy_tokenizer_and_cache_broken_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    missing = ("--tokenizer", str(tmp_path / "none.model"))
    code, _, checks = doctor(*missing, broken=["numpy"], folder=tmp_path, VIVACE_CACHE=str(tmp_path / "file" / "cache"))
    assert code == 1
    assert checks["numpy"]["state"] == "problem"
    assert checks["rich"]["state"] == "fine"
    assert checks["tokenizer"]["state"] == "problem"
    assert checks["cache folder"]["state"] == "problem"
    assert "VIVACE_CACHE" in checks["cache folder"]["do"]
