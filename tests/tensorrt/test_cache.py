"""Engines on disk: used where everything is equal, refused with the reason where anything is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import build as build_model
from tiny import random_tensors, tiny_config
from wanted import Subject

from vivace.backends.tensorrt import cache, identity, run, targets
from vivace.backends.tensorrt import module as modules
from vivace.backends.tensorrt.identity import Identity, identify
from vivace.backends.tensorrt.networks import Shapes
from vivace.config import TensorRTConfig
from vivace.errors import Unsupported

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
