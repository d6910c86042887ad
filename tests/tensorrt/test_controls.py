"""The comparison can fail: networks with one planted fault are caught, by the numbers or by the audit."""

from __future__ import annotations

import pytest
import torch
from wanted import Subject

from vivace.backends.tensorrt import audit, evaluate
from vivace.backends.tensorrt.identity import network_hash
from vivace.backends.tensorrt.networks import PARTS
from vivace.backends.tensorrt.operations import Operations
from vivace.backends.tensorrt.symbols import Writer
from vivace.errors import NumericsError, ShapeError

SAME = 1.0 - 1e-9  # in float32, without a plan
ROUNDED = 1.0 - 1e-6  # in float32 with E4M3 roundings, against the model that rounds in the same places
FP8 = 0.999


@pytest.fixture(scope="module")
def subject(rtx):
    return Subject(rtx, base="fp16", plan="fp8-mlp")


@pytest.fixture(scope="module")
def exact(rtx):
    return Subject(rtx)


@pytest.fixture(scope="module")
def simulated(rtx):
    return Subject(rtx, plan="fp8-mlp")


@pytest.fixture(scope="module")
def fused(rtx):
    return Subject(rtx, fused=True)


def missing_mask(monkeypatch):
    monkeypatch.setattr(Operations, "_bias", lambda self, keys: None)


def missing_residual(monkeypatch):
    plain = Operations.linear_residual_norm

    def without(self, x, layer, residual, gate, norm, modulation, into):
        return plain(self, x, layer, residual * 0.0, gate, norm, modulation, into)

    monkeypatch.setattr(Operations, "linear_residual_norm", without)


def mean_over_the_wrong_axis(monkeypatch):
    def mean(self, x):
        kinds, axis = self.module.api.ReduceOperation, len(x.shape) - 2
        return self.wrap(self.definition.add_reduce(x.tensor, kinds.AVG, 1 << axis, True), x.dtype, "mean")

    monkeypatch.setattr(Writer, "mean", mean)


def softmax_over_queries(monkeypatch):
    def softmax(self, x):
        layer = self.definition.add_softmax(x.tensor)
        layer.axes = 1 << (len(x.shape) - 2)
        return self.wrap(layer, x.dtype, "softmax")

    monkeypatch.setattr(Writer, "softmax", softmax)


def gate_and_up_swapped(monkeypatch):
    def geglu(self, x, layer, into):
        up, gate = self.linear(x, layer, "geglu").chunk(2, dim=-1)
        return self.hand_over(self.writer.activation("GELU_TANH", gate) * up, into)

    monkeypatch.setattr(Operations, "geglu", geglu)


def positions_not_rotated(monkeypatch):
    monkeypatch.setattr(Operations, "rotate", lambda self, x, rope: x)


def heads_not_scaled(monkeypatch):
    """Queries enter attention as they are."""
    plain = Writer.binary

    def binary(self, operation, x, other):
        scales = operation == "PROD" and other == x.shape[-1] ** -0.5
        return x if scales else plain(self, operation, x, other)

    monkeypatch.setattr(Writer, "binary", binary)


SUFFIX = ("step", "loop")
FAULTS = {
    missing_mask: ("prefix", *SUFFIX), missing_residual: PARTS, mean_over_the_wrong_axis: PARTS,
    softmax_over_queries: PARTS, gate_and_up_swapped: ("prefix", *SUFFIX), positions_not_rotated: ("prefix", *SUFFIX),
    heads_not_scaled: PARTS,
}  # fmt: skip
"""{fault: every part that has the operation}: SigLIP has no mask, no gate and no rotation."""


@pytest.mark.parametrize("part", PARTS)
def test_the_sound_network_keeps_the_bound(exact, part):
    assert exact.worst(exact.write(part)) > SAME


@pytest.mark.parametrize(("fault", "part"), [(fault, part) for fault, parts in FAULTS.items() for part in parts])
def test_a_fault_in_the_definition_is_a_wrong_number(exact, monkeypatch, fault, part):
    fault(monkeypatch)
    assert exact.worst(exact.write(part)) < SAME


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale"])
def test_swapped_scales(simulated, scale):
    """The scales of two layers exchanged where they are bound; exchanged in the network, the audit says so (test_audit)."""
    first, second = (f"prefix.layers.{index}.gate_up.{scale}" for index in (0, 1))
    swapped = dict(simulated.numbers)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    assert not torch.equal(swapped[first], swapped[second])
    network, wanted = simulated.write("prefix"), simulated.wanted("prefix", simulated=True)
    sound, got = (
        evaluate.run(network, simulated.feeds("prefix"), numbers=numbers) for numbers in (simulated.numbers, swapped)
    )
    assert simulated.alike(sound, wanted) > ROUNDED
    assert simulated.alike(got, wanted) < ROUNDED


def attention_told(**told):
    """Every fused attention of the network told something else."""

    def fault(monkeypatch):
        plain = Writer.wrap

        def wrap(self, layer, dtype, name):
            if name.startswith("attention"):
                for key, value in told.items():
                    setattr(layer, key, getattr(getattr(self.module.api, value[0]), value[1]))
            return plain(self, layer, dtype, name)

        monkeypatch.setattr(Writer, "wrap", wrap)

    return fault


def rotary_told(**told):
    """Every fused rotation of the network told something else."""

    def fault(monkeypatch):
        plain = Writer.wrap

        def wrap(self, layer, dtype, name):
            if name == "rotate":
                for key, value in told.items():
                    setattr(layer, key, value)
            return plain(self, layer, dtype, name)

        monkeypatch.setattr(Writer, "wrap", wrap)

    return fault


TOLD = {
    "interleaved": ("prefix", rotary_told(interleaved=True), "interleaved': 'True"),
    "causal": ("vision", attention_told(causal_kind=("CausalMaskKind", "UPPER_LEFT")), "UPPER_LEFT"),
    "causal from the end": ("vision", attention_told(causal_kind=("CausalMaskKind", "LOWER_RIGHT")), "LOWER_RIGHT"),
    "no softmax": ("prefix", attention_told(norm_op=("AttentionNormalizationOp", "NONE")), "norm_op': 'NONE"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_fused_layer_told_otherwise_is_refused_and_another_engine(fused, monkeypatch, name):
    part, fault, says = TOLD[name]
    sound, again = fused.write(part), fused.write(part)
    evaluate.look(sound.definition, sound.module.api)
    fault(monkeypatch)
    broken = fused.write(part)
    with pytest.raises(ShapeError, match=says):
        fused.evaluate(broken)
    assert network_hash(broken) != network_hash(sound) == network_hash(again)


@pytest.mark.parametrize(("size", "refused"), [(4, True), (8, False), (0, False)])
def test_a_rotation_of_a_part_of_the_head_is_refused(rtx, size, refused):
    builder = rtx.api.Builder(rtx.api.Logger())
    definition, kind = builder.create_network(0), rtx.api.DataType.FLOAT
    x = definition.add_input("x", kind, (1, 2, 3, 8))
    cos, sin = (definition.add_input(name, kind, (1, 3, (size or 8) // 2)) for name in ("cos", "sin"))
    layer = definition.add_rotary_embedding(x, cos, sin, interleaved=False, rotary_embedding_dim=size)
    definition.mark_output(layer.get_output(0))
    if refused:
        with pytest.raises(ShapeError, match="rotary_embedding_dim': '4"):
            evaluate.look(definition, rtx.api)
    else:
        assert len(evaluate.look(definition, rtx.api).steps) == 1


def test_decomposable_is_part_of_the_hash(fused, monkeypatch):
    """Same numbers, another kernel."""
    sound = network_hash(fused.write("prefix"))

    def wrap(self, layer, dtype, name, plain=Writer.wrap):
        if name.startswith("attention"):
            layer.decomposable = False
        return plain(self, layer, dtype, name)

    monkeypatch.setattr(Writer, "wrap", wrap)
    assert network_hash(fused.write("prefix")) != sound


def quantised_under_another_scale(monkeypatch):
    plain = Writer.dequantize

    def dequantize(self, x, scale, dtype, *, axis=None):
        return plain(self, x, scale if axis == 0 else scale * 2.0, dtype, axis=axis)

    monkeypatch.setattr(Writer, "dequantize", dequantize)


def test_a_value_dequantised_under_another_scale(subject, monkeypatch):
    quantised_under_another_scale(monkeypatch)
    network = subject.write("prefix")
    assert subject.worst(network) < FP8
    with pytest.raises(NumericsError, match="two scales"):
        audit.check(network, subject.chosen.format_of)


def test_inputs_are_held_to_their_declaration(subject):
    network, feeds = subject.write("vision"), subject.feeds("vision")
    for wrong in (feeds["images"].half(), feeds["images"][:1], feeds["images"].double()):
        with pytest.raises(ShapeError, match="images"):
            evaluate.run(network, {"images": wrong}, numbers=subject.numbers)
    with pytest.raises(ShapeError, match="not given"):
        evaluate.run(network, {}, numbers=subject.numbers)


def test_a_layer_without_a_rule_stops_the_evaluation(rtx):
    builder = rtx.api.Builder(rtx.api.Logger())
    definition = builder.create_network(0)
    x = definition.add_input("x", rtx.api.DataType.FLOAT, (2, 3))
    definition.mark_output(definition.add_topk(x, rtx.api.TopKOperation.MAX, 1, 2).get_output(0))
    with pytest.raises(ShapeError, match="TOPK"):
        evaluate.look(definition, rtx.api)


def test_gather_and_select(rtx):
    """Layers that no network uses today, but a definition may."""
    builder = rtx.api.Builder(rtx.api.Logger())
    definition, kinds = builder.create_network(0), rtx.api.DataType
    table = definition.add_input("table", kinds.FLOAT, (4, 3))
    rows = definition.add_input("rows", kinds.INT32, (2,))
    chosen = definition.add_input("chosen", kinds.BOOL, (2, 3))
    picked = definition.add_gather(table, rows, 0).get_output(0)
    zero = definition.add_elementwise(picked, picked, rtx.api.ElementWiseOperation.SUB).get_output(0)
    out = definition.add_select(chosen, picked, zero).get_output(0)
    definition.mark_output(out)
    given = {
        "table": torch.randn(4, 3), "rows": torch.tensor([3, 1], dtype=torch.int32),
        "chosen": torch.tensor([[True, False, True], [False, True, True]]),
    }  # fmt: skip
    got = evaluate.evaluate(evaluate.look(definition, rtx.api), given, {})[out.name]
    assert torch.equal(got, torch.where(given["chosen"], given["table"][[3, 1]], 0.0))
