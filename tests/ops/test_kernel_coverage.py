"""Coverage of the prefill kernels, filled by their own dispatch. On a CPU they run in Triton's interpreter, in float32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from vivace.config import GemmaConfig, ModelConfig, VisionConfig
from vivace.model.pi import Pi
from vivace.ops import prefill
from vivace.ops.prefill_tuning import Choice, Tile, Tuning
from vivace.precision import calibrate, fit, plan, quantize
from vivace.precision.coverage import Coverage, fallbacks, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(
    vision=VisionConfig(width=48, layers=1, mlp_width=32, num_heads=2, patch_size=14, image_size=28),
    prefix=GemmaConfig(width=32, layers=2, mlp_width=48, num_heads=8, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=16, layers=2, mlp_width=28, num_heads=8, num_kv_heads=1, head_dim=16),
    vocab_size=64,
)


class Mixed(Tuning):
    """Products of the MLPs by Triton, q, k and v by the BLAS."""

    def choose(self, epilogue, *, rows, shape, fp8):
        return Choice(None) if epilogue == "qkv_rope" else Choice(Tile(16, 16, 16, warps=4, stages=2))


def run(model):
    images = torch.randn(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    views = model.embed_views(images)
    prompt = model.embed_prompt(torch.arange(5, device=DEVICE)[None])
    model.prefill(torch.cat([views, prompt], dim=1), None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Pi(CONFIG).to(DEVICE).requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return made


def covered(model, chosen):
    seen = Coverage(kernel="torch")
    ones = torch.ones(256, 1, device=DEVICE)
    parts = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    ops = prefill.Prefill(
        prefill.constants_of(model), ones, tuning=Mixed(), patch_parts=parts, record=seen.record
    )  # fmt: skip
    model.ops = seen.wrap(prefill.table_of(ops))
    run(model)
    return rows(seen, steps=1, plan=chosen)


def test_every_operation_reports_its_kernel_and_its_precision(model):
    with calibrate.watch(model) as ranges:
        run(model)
    chosen = calibrate.with_ranges(plan.preset("fp8-mlp"), ranges, data="synthetic: test")
    fit.check_fit(chosen, fit.all_layers(model), checkpoint_hash="")
    names = quantize.apply(model, chosen)
    table = covered(model, chosen)
    kernels = {(row.layer, row.operation): row.kernel for row in table}
    assert kernels["prefix.layers.0.mlp.gate_up", "geglu"] == "triton"
    assert kernels["prefix.layers.0.attn.qkv", "qkv_rope"] == "cublas"
    assert kernels["vision.layers.0.norm1", "layer_norm"] == "triton"
    # the tiny network is float32, and float32 linears are torch's own by design
    assert {row.operation for row in table if row.kernel == "torch"} == {"linear"}
    assert {row.layer for row in table if row.precision == "e4m3"} == set(names)
    into_mlp = [row for row in table if row.layer == "prefix.layers.0.attn.o" and row.operation == "attention"]
    assert [row.precision for row in into_mlp] == ["float32"]
    assert fallbacks(table) == []


def test_a_holder_that_was_exchanged_is_a_fallback(model):
    with calibrate.watch(model) as ranges:
        run(model)
    chosen = calibrate.with_ranges(plan.preset("fp8-mlp"), ranges, data="synthetic: test")
    plain = model.prefix.block(0).gate_up
    quantize.apply(model, chosen)
    model.prefix.block(0).gate_up = plain
    assert fallbacks(covered(model, chosen)) == [
        "prefix.layers.0.mlp.gate_up geglu: the plan says e4m3, it ran in float32"
    ]
