"""Engines on disk: used where everything is equal, refused with the reason where anything is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import build as build_model
from tiny import random_tensors, tiny_config
from wanted import Subject

from vivace.backends.tensorrt import cache, identity, run, skeleton, targets
from vivace.backends.tensorrt import module as modules
from vivace.backends.tensorrt.build import Built
from vivace.backends.tensorrt.identity import Identity, identify
from vivace.backends.tensorrt.networks import Shapes
from vivace.config import ModelConfig, TensorRTConfig
from vivace.errors import Unsupported
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


def test_a_second_start_of_the_full_policy_builds_nothing(rtx, monkeypatch, tmp_path):
    """Prefix and step once for each of four prompt buckets; how long it takes is measured, not asserted (docs/log.md)."""
    built = []

    def build(network, *_, **__):
        built.append(network.label)
        return Built(bytes(6_000_000), 3.0)

    monkeypatch.setattr(run, "build", build)
    config, plan = ModelConfig(), preset("fp8-full")
    with torch.device("meta"):
        names = all_layers(Pi(config))
    outlined = skeleton.outline(config, base="bf16", formats=plan.formats(names))
    recipe = run.Recipe(rtx, outlined, {}, plan, baked=False, fused=False)
    wanted = (("vision", Shapes(batch=3)), ("prefix", Shapes(keys=768 + 256)), ("step", Shapes(keys=768 + 256)))
    for seconds in (3.0, 0.0):
        for part, shapes in wanted:
            assert run.make(recipe, part, shapes, targets=SM89, where=tmp_path).seconds == seconds
    assert len(built) == len(wanted)
