"""INT8 for GPUs without FP8: the same plans, audit and evaluator; built for RTX 20 and 30 too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wanted import Subject, make_checkpoint_tensors

from vivace.backends import tensorrt as backend
from vivace.backends.tensorrt import audit, evaluate, skeleton, targets
from vivace.backends.tensorrt.build import build, types_of
from vivace.backends.tensorrt.identity import network_hash
from vivace.backends.tensorrt.networks import PARTS
from vivace.backends.tensorrt.operations import Operations
from vivace.config import GemmaConfig
from vivace.errors import NumericsError
from vivace.precision.plan import Rule, preset

INT8 = 0.999
ROUNDED = 1.0 - 1e-6  # in float32: every rounding to INT8 where the model rounds
FULL = {
    "prefix": GemmaConfig(layers=2),
    "expert": GemmaConfig(width=1024, mlp_width=4096, layers=2),
}
HEAVY = {**FULL, "expert": GemmaConfig(width=64, layers=2, mlp_width=64)}  # only the prefix is looked at


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize("plan", ["int8-mlp", "int8-full"])
@pytest.mark.parametrize("options", [{}, {"baked": True}], ids=["inputs", "baked"])
def test_it_quantises_exactly_what_the_model_quantises(rtx, kind, plan, options):
    subject = Subject(rtx, kind=kind, plan=plan, **options)
    for part in PARTS:
        network = subject.write(part)
        audit.check(network, subject.chosen.format_of)
        assert subject.worst(network, wanted=subject.wanted(part, simulated=True)) > ROUNDED, part


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("plan", ["int8-mlp", "int8-full"])
def test_against_float32(rtx, plan, base):
    subject = Subject(rtx, base=base, plan=plan)
    network = subject.write("prefix")
    assert subject.worst(network) >= INT8
    assert subject.worst(network) < ROUNDED, "nothing was rounded"


def test_at_full_width(rtx):
    """Weights as make-checkpoint draws them, without loud channels; 0.99985 when this was written, int8-mlp 0.99996."""
    subject = Subject(rtx, base="fp16", plan="int8-full", changes=FULL, draw=make_checkpoint_tensors)
    network = subject.write("prefix")
    assert subject.worst(network) >= INT8
    assert build(network, targets.parse("sm86,sm89,sm120")).engine


def test_a_heavy_tail_costs_int8_more_than_e4m3(rtx):
    """Equal steps: 0.994 where E4M3 keeps 0.9998, the model's own INT8 alike. What `vivace check` is for."""
    subject = Subject(rtx, base="fp16", plan="int8-mlp", changes=HEAVY, quick=True)
    network, simulated, truth = (
        subject.write("prefix"), subject.wanted("prefix", simulated=True), subject.wanted("prefix"),
    )  # fmt: skip
    got = subject.evaluate(network)
    assert subject.alike(got, simulated) >= 0.999
    lost, own = 1.0 - subject.alike(got, truth), 1.0 - subject.alike(simulated, truth)
    assert own > 1.0 - INT8
    assert lost <= 1.25**2 * own


def test_a_percentile_cuts_the_tail_off(rtx):
    """Same network, 0.01 % of values saturate: 0.9999."""
    subject = Subject(rtx, base="fp16", plan="int8-mlp", changes=HEAVY, quick=True, percentile=99.99)
    assert subject.worst(subject.write("prefix")) >= INT8


# --- what must be noticed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(rtx):
    return Subject(rtx, plan="int8-mlp")


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale"])
def test_swapped_scales(subject, scale):
    first, second = (f"prefix.layers.{index}.gate_up.{scale}" for index in (0, 1))
    swapped = dict(subject.numbers)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    assert not torch.equal(swapped[first], swapped[second])
    network, wanted = subject.write("prefix"), subject.wanted("prefix", simulated=True)
    got = evaluate.run(network, subject.feeds("prefix"), numbers=swapped)
    assert subject.alike(got, wanted) < ROUNDED
    assert subject.alike(subject.evaluate(network), wanted) > ROUNDED


def test_values_that_are_cut_off_instead_of_rounded(subject, monkeypatch):
    plain = evaluate.round_to
    monkeypatch.setattr(evaluate, "round_to", lambda x, dtype: plain(x.trunc(), dtype))
    assert subject.worst(subject.write("prefix"), wanted=subject.wanted("prefix", simulated=True)) < ROUNDED


def test_weights_scaled_per_input(subject, monkeypatch):
    """The wrong axis: one scale per column. Refused by its shape, or by the audit."""
    plain = Operations.linear

    def linear(self, x, layer, operation="linear"):
        if not layer.name.endswith("gate_up"):
            return plain(self, x, layer, operation)
        w = self.writer
        rows = w.dequantize(self.hand_over(x, layer), self._scale(layer), layer.dtype)
        scale = w.slice(w.parameter(layer.weight_scale), 0, 0, layer.weight.shape[1])
        weight = w.dequantize(w.parameter(layer.weight), scale, layer.dtype, axis=1)
        out = w.matmul(rows, weight, name=f"{operation}|{layer.name}", transpose=True)
        return w.reshape(out, [self.batch, out.shape[0] // self.batch, out.shape[-1]])

    monkeypatch.setattr(Operations, "linear", linear)
    with pytest.raises(NumericsError, match="int8 value x int8 weight, scale misplaced, planned int8"):
        audit.check(subject.write("prefix"), subject.chosen.format_of)


@pytest.mark.parametrize(("built", "asked", "says"), [
    ("int8-mlp", "fp8-mlp", "gate_up geglu in int8, planned e4m3"),
    ("fp8-mlp", "int8-mlp", "gate_up geglu in e4m3, planned int8"),
    ("int8-full", "int8-mlp", "attn.qkv qkv_rope in int8, planned float16"),
    ("int8-mlp", "int8-full", "attn.qkv qkv_rope in float16, planned int8"),
    ("bf16", "int8-mlp", "gate_up geglu in float16, planned int8"),
])  # fmt: skip
def test_another_plan_than_the_network_was_written_for(rtx, built, asked, says):
    network = Subject(rtx, base="fp16", plan=built).write("prefix")
    with pytest.raises(NumericsError, match=says):
        audit.check(network, preset(asked).format_of)


def test_formats_are_different_engines(rtx):
    networks = [Subject(rtx, base="fp16", plan=plan).write("prefix") for plan in ("int8-mlp", "fp8-mlp", "bf16")]
    assert len({network_hash(network) for network in networks}) == 3
    assert [torch.int8 in types_of(network) for network in networks] == [True, False, False]


# --- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["int8-mlp", "int8-full"])
@pytest.mark.parametrize("gpus", ["sm80,sm86", "sm86,sm89,sm120,sm121"])
def test_all_networks_build_where_there_is_no_fp8(rtx, plan, gpus):
    subject = Subject(rtx, base="fp16", plan=plan)
    for part in PARTS[:3]:
        assert build(subject.write(part), targets.parse(gpus)).engine, part


def test_the_prefix_builds_for_turing(rtx):
    """RTX 20; its vision and step cannot be built, for their float32 products (test_build)."""
    assert build(Subject(rtx, base="fp16", plan="int8-full").write("prefix"), targets.parse("sm75")).engine


def test_orin_takes_an_int8_plan_and_no_fp8_plan(rtx, monkeypatch):
    monkeypatch.setattr(backend, "here", lambda device: targets.Target(87))
    assert backend.why_not_model(Subject(rtx, plan="int8-mlp").quantised) is None
    assert "sm87 (Jetson Orin) has no FP8: use an INT8 plan" in backend.why_not_model(
        Subject(rtx, plan="fp8-mlp").quantised
    )


def test_one_plan_with_both_formats(rtx):
    """A rule per layer decides; the audit sees each."""
    subject = Subject(rtx, base="fp16", plan="fp8-mlp")
    plan = replace(subject.chosen, rules=(Rule("prefix.layers.*.mlp.down", "int8"), Rule("prefix.layers.*.mlp.*")))
    names = skeleton.formats(subject.quantised)
    subject.outlined = skeleton.outline(subject.config, base="fp16", formats=plan.formats(names))
    found = {p.layer: p.precision for p in audit.check(subject.write("prefix"), plan.format_of)}
    assert (found["prefix.layers.0.mlp.gate_up"], found["prefix.layers.0.mlp.down"]) == ("e4m3", "int8")
