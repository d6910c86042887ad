"""What Triton's launcher needs: looked for in Triton's own order, and named where it is missing."""

from __future__ import annotations

import inspect

import pytest

from vivace.ops import toolchain

triton = pytest.importorskip("triton")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(programs on the PATH, CC, headers): a machine that has just these."""

    def make(*programs, cc=None, headers=True):
        monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)
        monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
        monkeypatch.delenv("CC", raising=False)
        if cc is not None:
            monkeypatch.setenv("CC", cc)
        (tmp_path / "include").mkdir(exist_ok=True)
        (tmp_path / "include" / "Python.h").unlink(missing_ok=True)
        if headers:
            (tmp_path / "include" / "Python.h").write_text("")
        return toolchain.compiler_missing()

    return make


@pytest.mark.parametrize("programs", [("gcc",), ("clang",), ("gcc", "clang")])
def test_gcc_or_clang_and_headers_are_enough(machine, programs):
    assert machine(*programs) is None


def test_no_compiler(machine):
    said = machine("cc", "g++")
    assert "no gcc and no clang" in said, "Triton does not look for cc"
    assert "apt-get install" in said


def test_the_compiler_that_the_user_named_is_the_only_one_that_counts(machine):
    assert machine("mine", cc="mine") is None
    assert "'mine'" in machine("gcc", cc="mine"), "Triton does not fall back to gcc"


def test_no_headers(machine, tmp_path):
    said = machine("gcc", headers=False)
    assert str(tmp_path / "include" / "Python.h") in said
    assert "python3-dev" in said


def test_a_launcher_in_the_cache_needs_no_compiler(machine, tmp_path):
    assert machine() is not None
    made = tmp_path / "cache" / "KEY" / "__triton_launcher.cpython-312-x86_64-linux-gnu.so"
    made.parent.mkdir(parents=True)
    made.touch()
    assert machine() is None


def test_a_build_of_ones_own_needs_neither(machine, monkeypatch):
    monkeypatch.setattr(triton.knobs.build, "impl", lambda *a: "x.so")
    assert machine(headers=False) is None


def test_debians_local_scheme_is_read_as_triton_reads_it(monkeypatch):
    monkeypatch.setattr(toolchain.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda scheme: {"include": f"/{scheme}"})
    assert str(toolchain.python_headers()) == "/posix_prefix"


def test_triton_still_looks_as_we_do():
    """What is mirrored; a Triton that looks elsewhere fails here and not on a user's machine."""
    build = inspect.getsource(triton.runtime.build._build)
    gcc, clang = build.index('which("gcc")'), build.index('which("clang")')
    assert 'environ.get("CC")' in build or "knobs.build.cc" in build
    assert "gcc if gcc is not None else clang" in build, (gcc, clang)
    assert 'sysconfig.get_paths(scheme=scheme)["include"]' in build
