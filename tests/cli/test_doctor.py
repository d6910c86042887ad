"""`vivace doctor` must work where vivace itself cannot: it is what a person runs then."""

import json
import os
import subprocess
import sys

import pytest

from vivace.check import health
from vivace.cli.broken import IMPORT_FAILURES, broken_import


def vivace_with_broken(folder, broken, *arguments, **environment):
    """Run a verb in a process of its own in which the modules `broken` raise when they are imported."""
    for name in broken:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was built for another machine')\n")
    variables = {**os.environ, **environment}
    if broken:
        variables["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-m", "vivace.cli.main", *arguments],
        capture_output=True, text=True, timeout=240, env=variables, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def doctor(*arguments, broken=(), folder=None, **environment):
    done = vivace_with_broken(folder, broken, "doctor", *arguments, **environment)
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


@pytest.mark.parametrize("library", ["tyro", "rich"])
def test_what_prints_the_report_is_broken(tmp_path, library):
    """Options and tables need libraries; the findings do not."""
    done = vivace_with_broken(tmp_path, [library], "doctor")
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks[library]["state"] == "problem"
    assert checks["numpy"]["state"] == "fine"
    first, *lines = done.stderr.splitlines()
    wanted = f"vivace doctor: {library} cannot be imported (RuntimeError: {library} was built for another machine)"
    assert first == wanted
    broken = (
        f"{library}: RuntimeError: {library} was built for another machine; pip install --force-reinstall {library}"
    )
    assert any(line.startswith("problem") and line.endswith(broken) for line in lines), lines


@pytest.mark.parametrize(
    ("library", "verb"),
    [("torch", "inspect"), ("numpy", "serve"), ("torch", "serve"), ("websockets", "serve"), ("rich", "inspect")],
)
def test_other_verbs_name_the_broken_library_in_one_line(tmp_path, checkpoint, library, verb):
    done = vivace_with_broken(tmp_path, [library], verb, str(checkpoint))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if f"vivace {verb}" in line]
    reason = f"{library} cannot be imported (RuntimeError: {library} was built for another machine)"
    assert lines == [f"vivace {verb}: {reason}; see vivace doctor"]
    assert done.stderr.splitlines() == lines


def test_the_list_of_verbs_needs_no_library(tmp_path):
    broken = ["tyro", "rich", "numpy", "torch"]
    assert "make-checkpoint" in vivace_with_broken(tmp_path, broken, "--help").stderr
    assert vivace_with_broken(tmp_path, broken, "serv").stderr == "unknown verb 'serv'. Did you mean 'serve'?\n"


def test_a_library_that_is_missing_and_one_that_lacks_a_name(tmp_path):
    (tmp_path / "half_there.py").write_text("from json import no_such_name\n")
    for name in ("no_such_library", "half_there"):
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport {name}"
        with pytest.raises(ImportError) as caught:
            exec(compile(code, "verb", "exec"), {"__name__": "vivace.cli.verb"})
        assert broken_import(caught.value) == name


def test_our_own_mistakes_are_not_blamed_on_a_library():
    for mistake in ("{}['key']", "from vivace.config import no_such_name", "import vivace.no_such_file"):
        with pytest.raises(IMPORT_FAILURES) as caught:
            exec(compile(mistake, "verb", "exec"), {"__name__": "vivace.cli.verb"})
        caught.value.__traceback__ = caught.value.__traceback__.tb_next  # this test's own frame
        assert broken_import(caught.value) is None


def test_the_compiler_that_kernels_need_is_named_where_there_is_a_gpu(monkeypatch):
    gpu = {"gpus": [{"name": "NVIDIA H100"}]}
    monkeypatch.setattr(
        health.environment, "compiler_missing", lambda: "Triton needs a C compiler; no gcc; install gcc"
    )
    (check,) = health._compiler(gpu)
    assert (check.state, check.do) == ("absent", "install gcc")
    assert "no kernel can be launched" in check.found
    assert health._compiler({"gpus": []}) == []
    assert health._compiler({"error": "broken"}) == []
    monkeypatch.setattr(health.environment, "compiler_missing", lambda: None)
    assert health._compiler(gpu)[0].state == "fine"


def test_the_compiler_is_looked_for_in_a_process_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    assert "no-such-compiler" in health.environment.compiler_missing()
