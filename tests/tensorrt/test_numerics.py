"""Each network, computed by the evaluator from its definition, is the model; broken definitions are not."""

from __future__ import annotations

import pytest
from wanted import Subject, make_checkpoint_tensors

from vivace.backends.tensorrt.networks import PARTS

FP16, FP8 = 0.9999, 0.999


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize("options", [{}, {"baked": True}, {"fused": True}], ids=["inputs", "baked", "fused"])
def test_in_float32_it_is_the_model_to_rounding(rtx, kind, options):
    subject = Subject(rtx, kind=kind, **options)
    for part in PARTS:
        assert subject.worst(subject.write(part)) > 1.0 - 1e-9, part


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_half_precision(rtx, kind, base):
    subject = Subject(rtx, kind=kind, base=base)
    for part in PARTS:
        assert subject.worst(subject.write(part)) >= FP16, part


@pytest.mark.parametrize("plan", ["fp8-mlp", "fp8-all"])
@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_a_plan_quantises_exactly_what_the_model_quantises(rtx, plan, kind):
    """In float32 only the E4M3 roundings are left, and every one of them is in the model's place."""
    subject = Subject(rtx, kind=kind, plan=plan)
    for part in PARTS:
        wanted = subject.wanted(part, simulated=True)
        assert subject.worst(subject.write(part), wanted=wanted) > 1.0 - 1e-6, part


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize("plan", ["fp8-mlp", "fp8-full", "fp8-all"])
def test_fp8_against_float32_with_weights_as_make_checkpoint_draws_them(rtx, plan, kind):
    """0.999 without loud channels in every network but one: all linears of a narrow prefix in E4M3 cost the model's own
    operations 0.9988 too, so no network can keep more. test_full_width: 0.9991 at the real width."""
    subject = Subject(rtx, kind=kind, base="fp16", plan=plan, draw=make_checkpoint_tensors)
    for part in PARTS:
        got, truth = subject.evaluate(subject.write(part)), subject.wanted(part)
        lost, own = 1.0 - subject.alike(got, truth), 1.0 - subject.alike(subject.wanted(part, simulated=True), truth)
        if plan != "fp8-mlp" and part == "prefix":
            assert own > 1.0 - FP8, "then 0.999 can be asked for"
            assert lost <= min(1.1 * own, 1.0 - 0.9988)
        else:
            assert lost <= 1.0 - FP8, part


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("plan", ["fp8-mlp", "fp8-full", "fp8-all"])
def test_fp8_plans(rtx, plan, base):
    """Against the plan's own numbers; against float32 the error may be a quarter larger than what E4M3 costs the model."""
    subject = Subject(rtx, base=base, plan=plan)
    for part in PARTS:
        got, simulated, truth = (
            subject.evaluate(subject.write(part)), subject.wanted(part, simulated=True), subject.wanted(part),
        )  # fmt: skip
        assert subject.alike(got, simulated) >= FP8, part
        lost, own = 1.0 - subject.alike(got, truth), 1.0 - subject.alike(simulated, truth)
        assert lost <= max(1.25**2 * own, 1.0 - FP8), part  # a cosine's loss is half the squared error
        if plan == "fp8-mlp":
            assert lost <= 1.0 - FP8, part
