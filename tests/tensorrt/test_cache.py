"""Engines on disk: used where everything is equal, refused with the reason where anything is not."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tiny import build as build_model
from tiny import random_tensors, tiny_config
from wanted import Subject

from vivace.backends.tensorrt import cache, identity, run, skeleton, targets
from vivace.backends.tensorrt import module as modules
from vivace.backends.tensorrt.build import Built
from vivace.backends.tensorrt.engine import NoMemory
from vivace.backends.tensorrt.identity import Identity, identify
from vivace.backends.tensorrt.networks import Shapes
from vivace.config import ModelConfig, TensorRTConfig
from vivace.errors import ConfigError, Unsupported
from vivace.model.pi import Pi
from vivace.precision.fit import all_layers
from vivace.precision.plan import preset

SM89, BOTH = targets.parse("sm89"), targets.parse("sm89,sm120")
WHO = Identity("tensorrt_rtx", "1.7.1.116", ("sm89", "sm120"), "0123456789abcdef", "inputs")
ENGINE = b"an engine\nof two lines"


def test_round_trip(tmp_path):
    path = cache.store(tmp_path, WHO, ENGINE, facts={"part": "prefix", "plan": "fp8-mlp"})
    assert path.name.startswith("prefix-sm89-sm120-")
    assert cache.load(path, WHO) == ENGINE
    assert cache.header(path)["facts"]["plan"] == "fp8-mlp"
    assert not list(tmp_path.glob("*.partial"))


def test_an_engine_for_more_targets_serves_each(tmp_path):
    cache.store(tmp_path, WHO, ENGINE, facts={})
    assert cache.find(tmp_path, replace(WHO, targets=("sm120",))).engine == ENGINE


@pytest.mark.parametrize(("changes", "says"), [
    ({"module": "tensorrt"}, "module tensorrt_rtx, wanted tensorrt"),
    ({"version": "1.8.0.1"}, "version 1.7.1.116, wanted 1.8.0.1"),
    ({"weights": "fedcba9876543210"}, "weights inputs, wanted fedcba"),
    ({"targets": ("sm86", "sm89")}, "for sm89, sm120, wanted sm86"),
])  # fmt: skip
def test_stale_and_foreign_engines(tmp_path, changes, says):
    path, wanted = cache.store(tmp_path, WHO, ENGINE, facts={}), replace(WHO, **changes)
    with pytest.raises(Unsupported, match=says):
        cache.load(path, wanted)
    found = cache.find(tmp_path, wanted)
    assert found.engine is None
    assert says in found.refused[0]


def test_engines_of_other_networks_are_not_even_candidates(tmp_path):
    path = cache.store(tmp_path, WHO, ENGINE, facts={})
    other = replace(WHO, network="ffffffffffffffff")
    assert cache.find(tmp_path, other) == cache.Found(None, None, ())
    with pytest.raises(Unsupported, match="network 0123456789abcdef"):
        cache.load(path, other)


FULL = {"gpu": "NVIDIA Thor", "driver": "580.00"}


@pytest.mark.parametrize(("here", "says"), [
    ({**FULL, "driver": "590.10"}, "built with driver 580.00, here is 590.10"),
    ({**FULL, "gpu": "NVIDIA H100"}, "built with gpu NVIDIA Thor, here is NVIDIA H100"),
])  # fmt: skip
def test_full_tensorrt_builds_for_one_gpu_and_driver(tmp_path, here, says):
    path = cache.store(tmp_path, WHO, ENGINE, facts={}, machine=FULL)
    assert cache.find(tmp_path, WHO, machine=FULL).engine == ENGINE
    found = cache.find(tmp_path, WHO, machine=here)
    assert found.engine is None
    assert says in found.refused[0]
    assert cache.store(tmp_path, WHO, ENGINE, facts={}, machine=here) != path, "one must not overwrite the other"


def test_engines_of_another_format(tmp_path, monkeypatch):
    path = cache.store(tmp_path, WHO, ENGINE, facts={})
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert f"format {cache.FORMAT - 1}, wanted {cache.FORMAT}" in cache.find(tmp_path, WHO).refused[0]
    assert cache.store(tmp_path, WHO, ENGINE, facts={}) != path


def test_what_the_machine_is(tmp_path, monkeypatch):
    said = tmp_path / "version"
    said.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert cache.driver(path=said) == "580.65.06"
    assert cache.driver(path=tmp_path / "none") == "unknown"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    monkeypatch.setattr(cache, "driver", lambda: "580.65.06")
    rtx, full = modules.Module("tensorrt_rtx", "1", None), modules.Module("tensorrt", "11", None)
    assert cache.machine(rtx, torch.device("cuda:1")) == {}
    assert cache.machine(full, torch.device("cuda:1")) == {"gpu": "GPU of cuda:1", "driver": "580.65.06"}
    assert cache.runtime_cache("tensorrt_rtx", "1", "sm89").name == "tensorrt_rtx-1-sm89-580.65.06.runtime"


def test_damage_is_noticed(tmp_path):
    path = cache.store(tmp_path, WHO, ENGINE, facts={})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(Unsupported, match="not those that were written"):
        cache.load(path, WHO)
    for junk in (
        b"",
        b"\x00" * 100,
        whole[:30],
        b"vivace tensorrt engine 1\nnot json\n",
        whole.replace(b"version", b"verzion"),
    ):
        path.write_bytes(junk)
        with pytest.raises(Unsupported, match="not an engine of this vivace"):
            cache.load(path, WHO)
        assert cache.find(tmp_path, WHO).engine is None


# --- what makes two engines different ---------------------------------------------------------------------------------


def who(subject, part="prefix", targets=BOTH):
    return identify(subject.write(part), subject.numbers, targets)


def test_identity_says_what_the_network_is(rtx):
    first = who(Subject(rtx, base="fp16"))
    assert first == who(Subject(rtx, base="fp16"))
    assert first.weights == "inputs"
    assert first.targets == ("sm89", "sm120")
    others = [
        Subject(rtx, base="bf16"), Subject(rtx, base="fp16", plan="fp8-mlp"), Subject(rtx, base="fp16", tokens=8),
        Subject(rtx, base="fp16", fused=True), Subject(rtx, kind="pi0", base="fp16"),
    ]  # fmt: skip
    assert len({first.network, *(who(other).network for other in others)}) == 6


def test_weights_count_only_where_they_are_stored(rtx):
    """Another checkpoint, or other ranges of the same plan: the same engine without weights, another one with."""
    for baked in (False, True):
        subject = Subject(rtx, base="fp16", plan="fp8-mlp", baked=baked)
        first = who(subject)
        scale = "prefix.layers.0.gate_up.input_scale"
        for name in (scale, "prefix.layers.1.o.weight", "prefix.layers.0.down.weight"):
            before = subject.numbers[name]
            wide = before.float() * 1.5 + 0.1
            subject.numbers[name] = wide.clamp(-400, 400).to(before.dtype)
            changed = who(subject)
            subject.numbers[name] = before
            assert (changed == first) == (not baked), name
            assert changed.network == first.network, name
        assert first.key != who(subject, targets=SM89).key


def test_json_round_trip():
    document = {name: getattr(WHO, name) for name in ("module", "version", "network", "weights")}
    assert identity.read({**document, "targets": list(WHO.targets), "more": 1}) == WHO


# --- make -------------------------------------------------------------------------------------------------------------


def test_make_builds_once(rtx, tmp_path):
    config = tiny_config("pi05")
    model = build_model(config, random_tensors(config))
    plan = run.recipe(model, rtx, TensorRTConfig(), base="fp16")
    first = run.make(plan, "prefix", Shapes(keys=40), targets=BOTH, where=tmp_path)
    again = run.make(plan, "prefix", Shapes(keys=40), targets=SM89, where=tmp_path)
    assert first.seconds > 0.0
    assert (again.seconds, again.engine, again.path) == (0.0, first.engine, first.path)
    assert cache.header(first.path)["facts"]["label"] == "prefix, 40 tokens"
    newer = run.Recipe(**{**vars(plan), "module": modules.Module(rtx.name, "1.9.9", rtx.api)})
    third = run.make(newer, "prefix", Shapes(keys=40), targets=SM89, where=tmp_path)
    assert third.seconds > 0.0
    assert "version 1.7" in third.refused[0]


def test_a_second_start_of_the_full_policy_takes_less_than_ten_seconds(rtx, monkeypatch, tmp_path):
    """Everything but the GPU's part: networks written, audited, hashed, found and read; prefix and step once for each of
    four prompt buckets. 3.3 s on two cores of a shared machine, where building them takes 27."""
    monkeypatch.setattr(run, "build", lambda *_, **__: Built(bytes(6_000_000), 3.0))
    config, plan = ModelConfig(), preset("fp8-full")
    with torch.device("meta"):
        names = all_layers(Pi(config))
    outlined = skeleton.outline(config, base="bf16", formats=plan.formats(names))
    recipe = run.Recipe(rtx, outlined, {}, plan, baked=False, fused=False)
    seconds = 0.0
    for part, buckets in (("vision", 1), ("prefix", 4), ("step", 4)):
        shapes = Shapes(batch=3) if part == "vision" else Shapes(keys=768 + 256)
        assert run.make(recipe, part, shapes, targets=SM89, where=tmp_path).seconds > 0.0
        begin = time.perf_counter()
        assert run.make(recipe, part, shapes, targets=SM89, where=tmp_path).seconds == 0.0
        seconds += buckets * (time.perf_counter() - begin)
    assert seconds < 10.0


def test_auto_weights():
    rtx, full = modules.Module("tensorrt_rtx", "1", None), modules.Module("tensorrt", "11", None)
    assert [run.is_baked(TensorRTConfig(), m) for m in (rtx, full)] == [False, True]
    assert run.is_baked(TensorRTConfig(weights="baked"), rtx)
    assert not run.is_baked(TensorRTConfig(weights="inputs"), full)


def test_numbers_keep_their_memory_where_types_agree(rtx):
    """Weights of a bfloat16 model are bound, not copied."""
    config = tiny_config("pi05")
    model = build_model(config, random_tensors(config), dtype_of=lambda name: torch.float32)
    plan = run.recipe(model, rtx, TensorRTConfig(), base="fp32")
    assert plan.numbers["prefix.layers.0.qkv.weight"].data_ptr() == model.prefix.block(0).qkv.weight.data_ptr()


def test_only_numbers_that_a_network_uses_are_converted(rtx):
    """The prompt's embedding is a gigabyte at full size, and stays where it is."""
    for kind in ("pi05", "pi0"):
        subject = Subject(rtx, kind=kind, base="fp16")
        used = {name for part in ("vision", "prefix", "step") for name in subject.write(part).parameters}
        assert set(subject.numbers) == used
        assert "embedding" not in used


class Refusing:
    """Stands in for `Engine`: refuses plans of `bad`."""

    def __init__(self, bad):
        self.bad, self.plans = bad, []

    def __call__(self, module, plan, **options):
        self.plans.append(plan)
        if plan in self.bad:
            raise Unsupported("refuses the engine", got="built by another driver")
        return plan


@pytest.mark.parametrize("second", [b"new", b"old"])
def test_a_cached_engine_that_the_run_time_refuses_is_built_again_once(tmp_path, monkeypatch, caplog, second):
    stored, asked = tmp_path / "prefix.engine", []
    stored.write_bytes(b"old")

    def make(recipe, part, shapes, *, anew=False, **options):
        asked.append((anew, stored.exists()))
        return run.Made(None, second if anew else b"old", stored, 1.0 if anew else 0.0, ())

    engine = Refusing({b"old"})
    monkeypatch.setattr(run, "make", make)
    monkeypatch.setattr(run, "Engine", engine)
    monkeypatch.setattr(run.audit, "record", lambda *_, **__: None)
    full = modules.Module("tensorrt", "11", None)
    runner = run.EngineRunner(run.Recipe(full, None, {}, preset("bf16"), False, False), torch.device("cpu"), None)
    if second == b"new":
        assert runner._make("prefix", Shapes(keys=40), None) == b"new"
    else:
        with pytest.raises(Unsupported, match="another driver"):
            runner._make("prefix", Shapes(keys=40), None)
    assert engine.plans == [b"old", second]
    assert asked == [(False, True), (True, False)]
    assert "prefix.engine is deleted and built again" in caplog.text


def test_a_sound_engine_without_memory_is_neither_deleted_nor_built_again(tmp_path, monkeypatch):
    stored, asked = tmp_path / "prefix.engine", []
    stored.write_bytes(b"old")

    def make(recipe, part, shapes, **options):
        asked.append(options.get("anew", False))
        return run.Made(None, b"old", stored, 0.0, ())

    def engine(*_, **__):
        raise NoMemory("no memory left", got="out of memory")

    monkeypatch.setattr(run, "make", make)
    monkeypatch.setattr(run, "Engine", engine)
    full = modules.Module("tensorrt", "11", None)
    runner = run.EngineRunner(run.Recipe(full, None, {}, preset("bf16"), False, False), torch.device("cpu"), None)
    with pytest.raises(NoMemory):
        runner._make("prefix", Shapes(keys=40), None)
    assert (asked, stored.read_bytes()) == ([False], b"old")


def test_a_fresh_engine_that_is_refused_is_not_built_again(tmp_path, monkeypatch):
    engine = Refusing({b"new"})
    monkeypatch.setattr(run, "make", lambda *_, **__: run.Made(None, b"new", tmp_path / "x.engine", 1.0, ()))
    monkeypatch.setattr(run, "Engine", engine)
    full = modules.Module("tensorrt", "11", None)
    runner = run.EngineRunner(run.Recipe(full, None, {}, preset("bf16"), False, False), torch.device("cpu"), None)
    with pytest.raises(Unsupported, match="another driver"):
        runner._make("prefix", Shapes(keys=40), None)
    assert engine.plans == [b"new"]


def test_anew_does_not_look_on_disk(rtx, tmp_path):
    config = tiny_config("pi05")
    plan = run.recipe(build_model(config, random_tensors(config)), rtx, TensorRTConfig(), base="fp16")
    first = run.make(plan, "vision", Shapes(batch=2), targets=SM89, where=tmp_path)
    again = run.make(plan, "vision", Shapes(batch=2), targets=SM89, where=tmp_path, anew=True)
    assert first.path == again.path
    assert again.seconds > 0.0


def test_a_folder_with_the_name_of_an_engine_is_refused_like_a_damaged_one(tmp_path):
    (tmp_path / "a.engine").mkdir()
    found = cache.find(tmp_path, WHO)
    assert found.engine is None
    assert "Is a directory" in found.refused[0]
    path = cache.store(tmp_path, WHO, ENGINE, facts={"part": "prefix"})
    assert cache.find(tmp_path, WHO).path == path


def test_an_engine_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write the engine"):
        cache.store(tmp_path / "file" / "engines", WHO, ENGINE, facts={})
