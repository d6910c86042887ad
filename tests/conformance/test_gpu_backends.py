"""Backends for GPUs pass the suite there, in bfloat16 and in FP8, with a network whose sizes the kernels take.

The bound says "this is the same network", no more: bfloat16 keeps 8 bits, and an action passes some fifty roundings. That
it loses no more than plain bfloat16 is held by tests/backends/test_cuda_graph.py, and bits by the suite itself. In FP8 the
truth is the same codes and scales with everything else in float32: plain PyTorch in bfloat16 is 0.054 away from it in K
and V, 0.034 in the first velocity, 0.015 in the actions, because a rounding can move a value to the next code. Here, on a
CPU, plain PyTorch stands in for the kernels, on the small network of the other tests.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from suite import CHECKS, STEPS, Formula, Subject, case_of, inputs_of
from tiny import build, random_tensors, tiny_config

from vivace.backends import base, eager
from vivace.config import GemmaConfig, VisionConfig
from vivace.ops.layers import Linear
from vivace.precision import coverage, plan, quantize
from vivace.precision.coverage import LINEARS
from vivace.precision.fit import all_layers
from vivace.precision.flavours import parameter_dtype

SIZES = {
    "vision": VisionConfig(width=144, layers=2, mlp_width=304, num_heads=2, patch_size=14, image_size=224),
    "prefix": GemmaConfig(width=512, layers=3, mlp_width=1024, num_heads=8, num_kv_heads=1, head_dim=256),
    "expert": GemmaConfig(width=256, layers=3, mlp_width=512, num_heads=8, num_kv_heads=1, head_dim=256),
}
BFLOAT16_BOUND, FP8_BOUND = 0.05, 0.1
STAND_IN_BOUND = 0.15
"""Of plain PyTorch on narrower layers, where a code that moved weighs more: 0.104 in pi0's first velocity."""
SCALES = ("row", "step")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def bfloat16(name):
    return parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")


@pytest.fixture(scope="module")
def subjects():
    """One backend per name, kind of policy and plan, kept for the module: captures and engines take time."""
    built: dict[tuple[str, str, str], Subject] = {}

    def get(name: str, kind: str, preset: str = "bf16") -> Subject:
        if reason := base.why_not(name, device="cuda") or lacking(preset):
            pytest.skip(f"{name}, {preset}: {reason}")
        if (name, kind, preset) not in built:
            built[name, kind, preset] = Subject(
                lambda model, config: base.build(name, model, config), kind,
                tolerance=BFLOAT16_BOUND if preset == "bf16" else FP8_BOUND, device="cuda", dtype_of=bfloat16,
                config_changes=SIZES, preset=preset,
            )  # fmt: skip
        return built[name, kind, preset]

    return get


def lacking(preset):
    """Why this GPU cannot run the plan of a preset ("NAME+scale:row" as in `suite.measured_plan`), or None."""
    from vivace.ops import prefill_limits

    name, _, scale = preset.partition("+scale:")
    chosen = plan.preset(name).with_input_scale(scale) if scale else plan.preset(name)
    for rule in chosen.rules:
        amax = None if rule.input_scale == "row" else 1.0
        made = quantize.quantise_layer(Linear(32, 32, name=rule.pattern).bfloat16(), amax=amax, format=rule.format)
        if reason := prefill_limits.why_not_layer(made, capability=torch.cuda.get_device_capability()):
            return reason
    return None


def stand_in(kind, create=eager.create, preset="fp8-all"):
    return Subject(create, kind, tolerance=STAND_IN_BOUND, dtype_of=bfloat16, preset=preset)


@pytest.fixture(scope="module")
def stand_ins():
    return {kind: stand_in(kind) for kind in ("pi0", "pi05")}


def nearer_to_its_own_formats(subject, *, by=1.5):
    """The actions are those of the plan, not those of the network without it."""
    for seed in (1, 2):
        case = case_of(subject.config, seed=seed)
        got = subject.run(inputs_of(case), case.noise)
        own, _ = subject.truth.sample(case)
        plain, _ = Formula(subject.config, subject.tensors).sample(case)
        assert float((got - plain).norm()) > by * float((got - own).norm())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("name", ["cuda_graph", "tensorrt"])
def test_backend_on_a_gpu(subjects, name, kind, check):
    CHECKS[check](subjects(name, kind))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_fp8_on_a_gpu(subjects, kind, check):
    CHECKS[check](subjects("cuda_graph", kind, "fp8-all"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("preset", ["bf16", "fp8-all", "int8-full"])
@pytest.mark.parametrize("capability", [(8, 9), (12, 0)], ids=["RTX 40", "RTX 50"])
def test_what_other_gpus_run(monkeypatch, capability, preset, kind):
    """Their choices, as far as this GPU can make them: no early weights, 99 KB of shared memory, cuBLAS; before Hopper no
    bulk copies and no early launches either."""
    from vivace.ops import blocks, denoise_ahead, launch, prefill, prefill_limits, prefill_tuning

    if reason := base.why_not("cuda_graph", device="cuda") or lacking(preset):
        pytest.skip(reason)
    tuning = prefill_tuning.tuning_for(capability, shared_bytes=101_376)
    if capability < (9, 0):
        monkeypatch.setattr(blocks, "bulk_copies", lambda device: False)
        monkeypatch.setattr(launch, "programmatic", lambda x: False)
        tuning = replace(tuning, early=())
    monkeypatch.setattr(denoise_ahead, "_unavailable", lambda device: "not here")
    monkeypatch.setattr(launch, "shared_bytes", lambda device: 101_376)
    monkeypatch.setattr(prefill_limits, "SHARED_BYTES", 0)  # of Hopper, which this GPU is
    monkeypatch.setattr(prefill, "tuning_for", lambda *_, **__: tuning)
    subject = Subject(
        lambda model, config: base.build("cuda_graph", model, config), kind,
        tolerance=BFLOAT16_BOUND if preset == "bf16" else FP8_BOUND, device="cuda", dtype_of=bfloat16,
        config_changes=SIZES, preset=preset,
    )  # fmt: skip
    for check in CHECKS.values():
        check(subject)
    kernels = set(subject.backend.describe()["kernels"].values())
    assert "gluon early weights" not in kernels
    assert "cublas, untuned" in kernels


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_int8_on_a_gpu(subjects, kind, check):
    CHECKS[check](subjects("cuda_graph", kind, "int8-full"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_int8_on_a_gpu_is_the_plans(subjects, kind):
    """Whole numbers lose so little that actions cannot tell: what was handed over does."""
    subject = subjects("cuda_graph", kind, "int8-full")
    case = case_of(subject.config, seed=1)
    subject.run(inputs_of(case), case.noise)
    table = coverage.rows(subject.model.ops.coverage, steps=STEPS, plan=plan.preset("int8-full"))
    assert coverage.fallbacks(table) == []
    ran = {
        (row.precision, row.kernel)
        for row in table
        if row.layer.startswith("prefix.layers") and row.operation in LINEARS
    }
    assert ran == {("int8", "triton, untuned")}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("scale", SCALES)
def test_finer_input_scales_on_a_gpu(subjects, scale, kind, check):
    CHECKS[check](subjects("cuda_graph", kind, f"fp8-all+scale:{scale}"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("preset", ["fp8-all", *(f"fp8-all+scale:{scale}" for scale in SCALES)])
def test_fp8_on_a_gpu_is_the_plans(subjects, kind, preset):
    nearer_to_its_own_formats(subjects("cuda_graph", kind, preset))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_fp8_of_plain_pytorch(stand_ins, kind, check):
    """The comparison itself, where there is no GPU."""
    CHECKS[check](stand_ins[kind])


@pytest.fixture(scope="module")
def finer_stand_ins():
    made = {}

    def get(kind, scale):
        if (kind, scale) not in made:
            made[kind, scale] = stand_in(kind, preset=f"fp8-all+scale:{scale}")
        return made[kind, scale]

    return get


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("scale", SCALES)
def test_finer_input_scales_of_plain_pytorch(finer_stand_ins, scale, kind, check):
    CHECKS[check](finer_stand_ins(kind, scale))


@pytest.mark.parametrize("preset", ["fp8-all", "int8-full"])
def test_plain_pytorch_in_float32_is_the_truth(preset):
    subject = Subject(eager.create, "pi05", preset=preset)
    CHECKS["agrees_with_the_literal_formula"](subject)


def unquantised(model, config):
    """A backend that ignores the plan."""
    tiny = tiny_config(model.config.kind)
    return eager.create(build(tiny, random_tensors(tiny), dtype_of=bfloat16), config)


def saturating(model, config):
    """A backend whose input scales are a fiftieth of the measured ones."""
    for layer in model.modules():
        if hasattr(layer, "input_scale"):
            layer.input_scale.data = layer.input_scale.data / 50
    return eager.create(model, config)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_backend_that_ignores_the_plan_is_noticed(stand_ins, kind):
    by = 1.2
    nearer_to_its_own_formats(stand_ins[kind], by=by)
    with pytest.raises(AssertionError):
        nearer_to_its_own_formats(stand_in(kind, unquantised), by=by)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_wrong_scales_are_noticed(kind):
    subject, caught = stand_in(kind, saturating), []
    for name in ("agrees_with_the_literal_formula", "trace_tells_the_truth", "cache_holds_keys_and_values"):
        try:
            CHECKS[name](subject)
        except AssertionError:
            caught.append(name)
    assert "cache_holds_keys_and_values" in caught


def test_a_gpu_without_these_formats_is_skipped_by_name(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    presets = ("bf16", "int8-full", "fp8-all+scale:step", "fp8-all", "fp8-all+scale:row")
    for capability, missing in (((8, 0), 3), ((8, 9), 1), ((12, 0), 1), ((9, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        reasons = [lacking(preset) for preset in presets]
        assert [reason is not None for reason in reasons] == [False] * (5 - missing) + [True] * missing
        assert all(f"{capability[0]}.{capability[1]}" in reason for reason in reasons[5 - missing :])


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("preset", ["fp8-all", "int8-full"])
def test_the_kernels_take_this_network_in_8_bits(preset, kind, monkeypatch):
    """Else the tests on a GPU would be refused there."""
    pytest.importorskip("triton", reason="triton is not installed")
    from vivace.backends import cuda_graph
    from vivace.ops import launch, prefill_limits

    config = tiny_config(kind, **SIZES)
    model = build(config, random_tensors(config), dtype_of=bfloat16)
    rules = plan.preset(preset).rules
    quantize.apply(model, plan.PrecisionPlan(preset, rules, dict.fromkeys(all_layers(model), 1.0)))
    assert cuda_graph.why_not_model(model) == "the prefill kernels need an NVIDIA GPU, not cpu", "nothing else"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0) if preset == "fp8-all" else (8, 0))
    monkeypatch.setattr(launch, "shared_bytes", lambda device: prefill_limits.SHARED_BYTES)
    assert prefill_limits.why_not(device="cuda", model=model) is None
