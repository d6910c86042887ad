"""`vivace check` on a real tiny checkpoint: passes what is right, fails what is wrong, and says where."""

import dataclasses

import numpy as np
import pytest

from vivace.backends.eager import EagerBackend
from vivace.check import results
from vivace.check.observations import synthetic
from vivace.cli import check as verb
from vivace.runtime.policy import load_policy

FAST = ("--observations", "2", "--steps", "3")


class Wrong:
    """The candidate's backend with a deliberate error."""

    name = "wrong"

    def __init__(self, inner, change):
        self.inner, self.change = inner, change

    def prefill(self, inputs, *, trace=None, spans=None):
        cache = self.inner.prefill(inputs, trace=trace, spans=spans)
        return dataclasses.replace(cache, **self.change(cache))

    def describe(self):
        return self.inner.describe()

    def denoise(self, cache, noise, *, previous=None, trace=None, spans=None):
        return self.inner.denoise(cache, noise, previous=previous, trace=trace, spans=spans)


def break_candidate(monkeypatch, change, *, backend=None):
    """Put the error into the candidate; `backend`: the name under which it runs, so that it is not taken for eager."""
    real, loaded = verb.load, []

    def load(*args, **options):
        policy = real(*args, **options)
        loaded.append(policy)
        if len(loaded) == 2:
            policy.backend = Wrong(policy.backend, change)
            policy.engine = dataclasses.replace(policy.engine, backend=backend or policy.engine.backend)
        return policy

    monkeypatch.setattr(verb, "load", load)


def test_bfloat16_passes_and_everything_is_recorded(vivace, checkpoint, tmp_path):
    code, document, text = vivace("check", checkpoint, "--precision", "bfloat16", *FAST, "-o", tmp_path / "c.json")
    assert code == 0
    assert document == results.read_result(tmp_path / "c.json")
    assert (document["kind"], document["schema"], document["passed"]) == ("check", results.SCHEMA, True)
    assert document["engine"]["precision"] == "bfloat16"
    assert document["reference"]["precision"] == "float32"
    assert document["observations"] == {"source": "synthetic", "count": 2, "seed": 0}
    assert document["setting"]["views"] == 2
    assert document["setting"]["steps"] == 3
    worst = document["summary"]["worst"]
    assert (len(worst["k"]), len(worst["v"]), len(worst["velocity"]), len(worst["x"])) == (2, 2, 3, 4)
    assert 1e-5 < worst["k"][0]["rel_l2"] < 1e-2, "bfloat16 must differ from float32, a little"
    assert len(worst["robot"]["max_abs"]) == 7
    assert document["environment"]["python"]
    assert "K layer 1" in text
    assert "marks passed" in text
    assert document["plain"] is None
    assert "nothing to compare it with here but the absolute marks" in " ".join(text.split())


def test_the_engine_is_described_as_it_is_after_it_ran(vivace, checkpoint, monkeypatch):
    """Graphs are recorded, and kernels chosen, by the first call."""
    runs = []
    run = EagerBackend.denoise

    def denoise(self, *args, **options):
        runs.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(EagerBackend, "denoise", denoise)
    monkeypatch.setattr(EagerBackend, "describe", lambda self: {"ran": len([one for one in runs if one is self])})
    code, document, _ = vivace("check", checkpoint, "--precision", "bfloat16", *FAST)
    assert code == 0
    assert document["engine"]["details"]["ran"] == 3, "two observations, and one for the coverage"


def test_in_bfloat16_another_engine_is_held_against_plain_pytorch(vivace, checkpoint, monkeypatch):
    """2 % on V passes every absolute mark; twice the error of plain bfloat16 is less."""
    break_candidate(monkeypatch, lambda cache: {}, backend="compiled")
    code, document, text = vivace("check", checkpoint, "--precision", "bfloat16", *FAST)
    assert code == 0
    assert any(mark["what"].endswith("against plain bfloat16") for mark in document["marks"])
    assert "absolute marks" not in text
    plain = document["plain"]["worst"]
    assert 0.999 < plain["k"][1]["cosine"] < 1.0, "what the yardstick itself loses stands beside the marks"
    assert len(plain["velocity"]) == len(document["summary"]["worst"]["velocity"])

    monkeypatch.undo()
    break_candidate(monkeypatch, lambda cache: {"v": tuple(v * 0.98 for v in cache.v)}, backend="compiled")
    code, document, _ = vivace("check", checkpoint, "--precision", "bfloat16", *FAST)
    assert code == 1
    failed = [mark["what"] for mark in document["marks"] if not mark["passed"]]
    assert "V layer 0, relative L2 against plain bfloat16" in failed
    assert all("against plain" in what for what in failed)


def test_float32_against_itself_is_exact_and_says_that_this_proves_little(vivace, checkpoint):
    code, document, text = vivace("check", checkpoint, "--precision", "float32", *FAST)
    assert code == 0
    assert document["summary"]["worst"]["actions"]["sqnr_db"] == "inf"
    assert "not accuracy" in " ".join(text.split())


def test_a_missing_scale_exits_1_and_names_the_stage(vivace, checkpoint, monkeypatch):
    break_candidate(monkeypatch, lambda cache: {"v": tuple(v * 0.98 for v in cache.v)})
    code, document, text = vivace("check", checkpoint, "--precision", "float32", *FAST)
    assert code == 1
    assert not document["passed"]
    failed = [mark["what"] for mark in document["marks"] if not mark["passed"]]
    assert "V layer 0, relative L2" in failed
    assert not [what for what in failed if what.startswith("K")]
    assert "V layer 0, relative L2" in text


def test_a_stale_cache_exits_1(vivace, checkpoint, monkeypatch, tmp_path):
    kept = []

    def stale(cache):
        kept.append(cache)
        return {name: getattr(kept[0], name) for name in ("k", "v", "mask", "length")}

    break_candidate(monkeypatch, stale)
    same_prompt = [dict(request, task="push the button") for request in synthetic(load_policy(checkpoint).io, 2)]
    for i, request in enumerate(same_prompt):
        request["observation.state"] = same_prompt[0]["observation.state"]  # prompts of one length, images that differ
        np.savez(tmp_path / f"{i}.npz", **request)
    code, document, _ = vivace(
        "check", checkpoint, "--precision", "bfloat16", "--observations", tmp_path, "--steps", "2"
    )
    assert code == 1
    assert document["summary"]["worst_observation"] == 1
    assert document["summary"]["worst"]["k"][0]["cosine"] < 0.99


def test_a_cache_of_another_length_exits_1(vivace, checkpoint, monkeypatch):
    def short(cache):
        return {"k": tuple(k[:, :-1] for k in cache.k), "v": tuple(v[:, :-1] for v in cache.v)}

    break_candidate(monkeypatch, short)
    code, document, text = vivace("check", checkpoint, "--precision", "bfloat16", *FAST)
    assert code == 1
    assert "cannot compare" in document["error"]
    assert "cannot compare" in text


def test_nan_exits_1(vivace, checkpoint, monkeypatch):
    break_candidate(monkeypatch, lambda cache: {"v": tuple(v * float("nan") for v in cache.v)})
    code, document, _ = vivace("check", checkpoint, "--precision", "bfloat16", *FAST)
    assert code == 1
    assert document["summary"]["worst"]["v"][0]["rel_l2"] == "nan"


def test_recorded_observations(vivace, checkpoint, tmp_path):
    request = synthetic(load_policy(checkpoint).io, 1)[0]
    np.savez(tmp_path / "0.npz", **request)
    code, document, _ = vivace(
        "check", checkpoint, "--precision", "float32", "--observations", tmp_path, "--steps", "2"
    )
    assert code == 0
    assert document["observations"]["source"].startswith("recorded")
    assert document["observations"]["count"] == 1


@pytest.mark.parametrize(
    "bad", [("--observations", "none/"), ("--backend", "turbo"), ("--precision", "fp3"), ("--no-such", "1")]
)
def test_bad_use_exits_2(vivace, checkpoint, bad):
    code, document, _ = vivace("check", checkpoint, *bad)
    assert (code, document) == (2, None)


def test_no_checkpoint_exits_2(vivace, tmp_path):
    assert vivace("check", tmp_path / "none")[0] == 2


@pytest.mark.parametrize(("bad", "said"), [
    (("--precision", "none.json"), "none.json"),
    (("--precision", "fp8-all"), "no activation ranges"),
    (("--observations", "0"), "a number from 1"),
    (("--observations=-3",), "a number from 1"),
    (("--observations", "2.5"), "a number from 1"),
    (("--observations", "none/"), "no recorded observations"),
    (("--seed=-1",), "--seed cannot be used; got -1; wanted at least 0"),
    (("--horizon", "3"), "got horizon 3; wanted 6"),
])  # fmt: skip
def test_bad_arguments_are_found_before_anything_is_loaded(vivace, checkpoint, monkeypatch, bad, said):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("loaded first"))
    code, document, text = vivace("check", checkpoint, *bad)
    assert (code, document) == (2, None)
    assert said in " ".join(text.split())
