"""Every matrix product of every network in the type that the plan says; a network that differs is refused."""

from __future__ import annotations

import pytest
from wanted import STEPS, Subject

from vivace.backends.tensorrt import audit, networks
from vivace.backends.tensorrt.operations import Operations
from vivace.backends.tensorrt.symbols import Writer
from vivace.cli.output import show_coverage
from vivace.errors import NumericsError
from vivace.precision.coverage import Coverage, as_json, rows, summary
from vivace.precision.fit import all_layers
from vivace.precision.plan import PRESETS, preset

KEPT = {("keep", "16"), ("keep", "32")}  # the end of bfloat16, float32


@pytest.mark.parametrize("plan", PRESETS)
@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_every_plan(rtx, plan, kind):
    subject = Subject(rtx, kind=kind, base="bf16", plan=plan)
    for part in networks.PARTS:
        found = audit.check(subject.write(part), subject.chosen.format_of)
        for product in found:
            planned = "keep" if product.is_attention else subject.chosen.format_of(product.layer)
            assert product.precision == planned or (planned, product.precision[-2:]) in KEPT, product


def test_one_prefix_layer_has_its_six_products(rtx):
    subject = Subject(rtx, base="fp16", plan="fp8-mlp")
    found = [p for p in audit.products(subject.write("prefix")) if p.layer.startswith("prefix.layers.0.")]
    assert [(p.operation, p.precision) for p in found] == [
        ("qkv_rope", "float16"), ("attention_scores", "float16"), ("attention_mix", "float16"),
        ("linear_residual_norm", "float16"), ("geglu", "e4m3"), ("linear_residual_norm", "e4m3"),
    ]  # fmt: skip


def test_fused_attention_is_seen(rtx):
    subject = Subject(rtx, base="fp16", fused=True)
    found = audit.check(subject.write("prefix"), subject.chosen.format_of)
    assert sum(product.operation == "attention" for product in found) == subject.config.prefix.layers - 1


@pytest.mark.parametrize(("built", "asked", "says"), [
    ("fp8-mlp", "fp8-full", "attn.qkv qkv_rope in float16, planned e4m3"),
    ("fp8-full", "fp8-mlp", "attn.qkv qkv_rope in e4m3, planned float16"),
    ("bf16", "fp8-mlp", "gate_up geglu in float16, planned e4m3"),
])  # fmt: skip
def test_another_plan_than_the_network_was_written_for(rtx, built, asked, says):
    network = Subject(rtx, base="fp16", plan=built).write("prefix")
    with pytest.raises(NumericsError, match=says):
        audit.check(network, preset(asked).format_of)


def left_in_float32(monkeypatch):
    plain = Operations.linear

    def linear(self, x, layer, operation="linear"):
        if layer.name != "prefix.layers.1.attn.o":
            return plain(self, x, layer, operation)
        weight = self.writer.parameter(layer.weight).float()
        product = self.writer.matmul(x.float(), weight, name=f"{operation}|{layer.name}", transpose=True)
        return product.to(x.dtype)

    monkeypatch.setattr(Operations, "linear", linear)
    return "prefix.layers.1.attn.o linear_residual_norm in float32, planned float16"


def weights_alone_quantised(monkeypatch):
    """Q/DQ forgotten on the way in: the product would run in half precision, with E4M3 weights."""

    def hand_over(self, x, into):
        return x

    def linear(self, x, layer, operation="linear"):
        w = self.writer
        weight = w.parameter(layer.weight)
        if hasattr(layer, "weight_scale"):
            weight = w.dequantize(weight, w.parameter(layer.weight_scale), layer.dtype, axis=0)
        out = w.matmul(x.to(layer.dtype), weight, name=f"{operation}|{layer.name}", transpose=True)
        return out if layer.bias is None else out + w.parameter(layer.bias).to(out.dtype)

    monkeypatch.setattr(Operations, "hand_over", hand_over)
    monkeypatch.setattr(Operations, "linear", linear)
    return "geglu in float16 x e4m3 weight, planned e4m3"


def a_product_twice(monkeypatch):
    plain = Operations.linear

    def linear(self, x, layer, operation="linear"):
        plain(self, x, layer, operation)
        return plain(self, x, layer, operation)

    monkeypatch.setattr(Operations, "linear", linear)
    return "2 products, wanted 1"


def an_unnamed_product(monkeypatch):
    plain = Writer.matmul

    def matmul(self, x, y, *, name, transpose=False):
        return plain(self, x, y, name=name.replace("mlp.down", "other"), transpose=transpose)

    monkeypatch.setattr(Writer, "matmul", matmul)
    return "planned no product"


@pytest.mark.parametrize("fault", [left_in_float32, weights_alone_quantised, a_product_twice, an_unnamed_product])
def test_the_audit_names_what_differs(rtx, monkeypatch, fault):
    subject = Subject(rtx, base="fp16", plan="fp8-mlp")
    says = fault(monkeypatch)
    with pytest.raises(NumericsError, match=says):
        audit.check(subject.write("prefix"), subject.chosen.format_of)


def exchanged(monkeypatch, what, *, first="prefix.layers.0.gate_up", second="prefix.layers.1.gate_up"):
    """The writer gets two layers' parameters under each other's names; products keep the names of their layers."""
    plain = networks._Given.__init__

    def init(self, names, numbers, baked):
        swap = {f"{first}.{what}": f"{second}.{what}", f"{second}.{what}": f"{first}.{what}"}
        plain(self, {key: swap.get(name, name) for key, name in names.items()}, numbers, baked)

    monkeypatch.setattr(networks._Given, "__init__", init)


@pytest.mark.parametrize("baked", [False, True], ids=["inputs", "baked"])
@pytest.mark.parametrize("what", ["weight", "weight_scale", "input_scale"])
def test_a_product_with_the_numbers_of_another_layer(rtx, monkeypatch, what, baked):
    subject = Subject(rtx, base="fp16", plan="fp8-mlp", baked=baked)
    exchanged(monkeypatch, what)
    network = subject.write("prefix")
    with pytest.raises(NumericsError, match=rf"layers.0.mlp.gate_up geglu reads .*prefix.layers.1.gate_up.{what}"):
        audit.check(network, subject.chosen.format_of)
    problems = audit.mismatches(network, audit.products(network), subject.chosen.format_of)
    assert [line.partition(" reads ")[0] for line in problems] == [
        f"prefix.layers.{index}.mlp.gate_up geglu" for index in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_a_plain_product_with_the_weight_of_another_layer(rtx, monkeypatch, kind):
    """Unquantised linears too; pi0's cut one is known by its whole."""
    first, second = ("action_time_out", "action_time_in") if kind == "pi0" else ("action_in", "time_in")
    subject = Subject(rtx, kind=kind, base="fp16")
    if kind == "pi0":
        cut = [p for p in audit.check(subject.write("step"), subject.chosen.format_of) if p.layer == second]
        assert [p.reads for p in cut] == [("action_time_in.weight",)]
    exchanged(monkeypatch, "weight", first=first, second=second)
    network = subject.write("step")
    with pytest.raises(NumericsError, match=f"{first}.* reads {second}.weight"):
        audit.check(network, subject.chosen.format_of)


def test_a_scale_that_is_computed(rtx, monkeypatch):
    plain = Operations._scale
    monkeypatch.setattr(Operations, "_scale", lambda self, layer: plain(self, layer) * 1.0)
    subject = Subject(rtx, base="fp16", plan="fp8-mlp")
    with pytest.raises(NumericsError, match="the result of prod"):
        audit.check(subject.write("prefix"), subject.chosen.format_of)


def test_the_table_is_that_of_the_other_engines(rtx, capsys):
    """Same rows, same operations as the model's own record of an eager run; attention and linears alike."""
    subject = Subject(rtx, base="fp16", plan="fp8-all")
    seen = Coverage(kernel="tensorrt_rtx")
    for part in ("vision", "prefix", "step"):
        found = audit.check(subject.write(part), subject.chosen.format_of)
        audit.record(seen, found, part=part, kernel="tensorrt_rtx")
    table = rows(seen, steps=STEPS, plan=subject.chosen, layers=all_layers(subject.quantised))
    assert summary(table)["fallbacks"] == []
    own = Coverage(kernel="eager")
    subject.quantised.ops = own.wrap(subject.quantised.ops)
    subject.quantised.embed_views(subject.inputs.images)
    subject.quantised.prefill(*subject.embeds)
    context = subject.quantised.suffix_context(subject.cache, subject.config.horizon)
    subject.quantised.denoise_step(subject.noise, subject.model.time_table(STEPS).at(0), subject.cache, context)
    products = {
        key: entry.flops for key, entry in own.seen.items() if not key[1].endswith("_norm") or "linear" in key[1]
    }
    renamed = {(layer, "vision_attention" if key == ("vision", "attention") else op): entry.flops
               for (layer, op), entry in seen.seen.items() for key in [(layer.split(".")[0], op)]}  # fmt: skip
    assert renamed == products
    show_coverage(as_json(table), title="as in check")
    assert "tensorrt_rtx" in capsys.readouterr().err
