"""The first denoise step behind the prefix: order of the hooks (CPU), and no key read before it is written (GPU)."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import cuda_graph, eager
from vivace.backends.loop import run_flow
from vivace.backends.spans import Spans
from vivace.config import EngineConfig, GemmaConfig, VisionConfig
from vivace.ops import denoise, prefill
from vivace.ops.table import reference_ops
from vivace.precision.flavours import parameter_dtype
from vivace.types import ModelInputs, PreviousChunk

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Log:
    """Stands in for `Wavefront`: notes what would be waited for."""

    def __init__(self):
        self.awaited = []

    def await_keys(self, layer):
        self.awaited.append(layer)


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    images = torch.randint(0, 256, (1, 2, 3, 56, 56), dtype=torch.uint8)
    return model, ModelInputs(images, torch.randint(0, 64, (1, 5))), torch.randn(1, config.horizon, 32)


def test_each_layer_is_announced_once_and_only_when_its_keys_are_there(tiny):
    model, inputs, _ = tiny
    embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
    made, seen = [], []
    original = model.ops

    def counted(*args):
        made.append(1)
        return original.qkv_rope(*args)

    def last(*args):
        made.append(1)
        return original.kv_rope(*args)

    model.ops = replace(original, qkv_rope=counted, kv_rope=last)
    try:
        model.prefill(embeds, mask, written=lambda layer: seen.append((layer, len(made))))
    finally:
        model.ops = original
    layers = model.config.prefix.layers
    assert seen == [(layer, layer + 1) for layer in range(layers)]


def test_only_the_first_step_waits_and_for_every_layer_in_order(tiny):
    model, inputs, noise = tiny
    backend, log = eager.create(model, EngineConfig(num_denoise_steps=3)), Log()
    cache, table = backend.prefill(inputs), model.time_table(3)
    actions = run_flow(model, None, table, cache, noise, previous=None, trace=None, await_keys=log.await_keys)
    assert log.awaited == list(range(model.config.expert.layers))
    assert torch.equal(actions, backend.denoise(cache, noise))


def test_a_layer_waits_before_its_first_operation(tiny):
    model, inputs, noise = tiny
    backend, order, original = eager.create(model, EngineConfig(num_denoise_steps=1)), [], model.ops
    cache = backend.prefill(inputs)

    def noted(*args):
        order.append("qkv")
        return original.qkv_rope(*args)

    class Ordered:
        def await_keys(self, layer):
            order.append(layer)

    model.ops = replace(original, qkv_rope=noted)
    try:
        run_flow(
            model, None, model.time_table(1), cache, noise, previous=None, trace=None, await_keys=Ordered().await_keys
        )
    finally:
        model.ops = original
    assert order == [item for layer in range(model.config.expert.layers) for item in (layer, "qkv")]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    config = replace(
        tiny_config("pi05"),
        vision=VisionConfig(width=144, layers=2, mlp_width=304, num_heads=2, patch_size=14, image_size=224),
        prefix=GemmaConfig(width=512, layers=4, mlp_width=1024, num_heads=8, num_kv_heads=1, head_dim=256),
        # full width: what kernels with early weights are cut for
        expert=GemmaConfig(width=1024, layers=4, mlp_width=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    )

    def bf16(name):
        return parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")

    return build(config, random_tensors(config), dtype_of=bf16, device="cuda")


def backend_of(model, *, wavefront, early_weights=False):
    ops = denoise.denoise_ops(prefill.prefill_ops(model), early_weights=early_weights)
    return cuda_graph.CudaGraphBackend(model, EngineConfig(num_denoise_steps=4), ops=ops, wavefront=wavefront)


def gpu_request(seed, tokens=9):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (1, 2, 3, 224, 224), dtype=torch.uint8, generator=g).cuda()
    return ModelInputs(images, torch.randint(0, 64, (1, tokens), generator=g).cuda())


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("horizon", [10, 20])
@pytest.mark.parametrize("mode", [None, "trained", "guided"])
def test_it_gives_the_bits_of_the_serial_order_for_every_kind_of_chunking(network, mode, horizon, early):
    serial = backend_of(network, wavefront=False, early_weights=early)
    behind = backend_of(network, wavefront=True, early_weights=early)
    noise, previous = torch.randn(1, horizon, 32, device="cuda"), None
    if mode is not None:
        weights = torch.linspace(1, 0, horizon, device="cuda") if mode == "guided" else None
        previous = PreviousChunk(torch.randn(1, horizon, 32, device="cuda"), 3, mode, weights)
    for seed in range(100):
        inputs = gpu_request(seed)
        wanted = serial.denoise(serial.prefill(inputs), noise, previous=previous)
        assert torch.equal(behind.infer(inputs, noise, previous=previous), wanted)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("horizon", [10, 20])
def test_early_weights_lose_no_more_than_plain_bfloat16(network, horizon):
    engine = EngineConfig(num_denoise_steps=4)
    inputs, noise = gpu_request(3), torch.randn(1, horizon, 32, device="cuda")
    wide = copy.deepcopy(network).float()
    wide.ops = reference_ops()
    truth = eager.create(wide, engine).infer(inputs, noise)
    network.ops = reference_ops()
    plain = eager.create(network, engine).infer(inputs, noise)
    got = backend_of(network, wavefront=True, early_weights=True).infer(inputs, noise)
    assert (got - truth).norm() <= 1.25 * (plain - truth).norm()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("wavefront", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_no_key_is_read_before_this_replay_has_written_it(network, monkeypatch, wavefront, early):
    """Keys and values are poisoned before every replay: whoever reads one too early gets NaN."""
    behind, caches = backend_of(network, wavefront=wavefront, early_weights=early), []
    original = network.prefill

    def kept(*args, **kwargs):
        caches.append(original(*args, **kwargs))
        return caches[-1]

    monkeypatch.setattr(network, "prefill", kept)
    inputs, noise = gpu_request(1), torch.randn(1, 20, 32, device="cuda")
    wanted = behind.infer(inputs, noise)
    for _ in range(100):
        for tensor in (*caches[-1].k, *caches[-1].v):
            tensor.fill_(float("nan"))
        assert torch.equal(behind.infer(inputs, noise), wanted)


@gpu
@pytest.mark.gpu
def test_stages_timed_inside_the_graph_add_up_to_it(network):
    behind = backend_of(network, wavefront=True)
    inputs, noise = gpu_request(1), torch.randn(1, 20, 32, device="cuda")
    behind.infer(inputs, noise)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    spans = Spans(cuda=True)
    begin.record()
    behind.infer(inputs, noise, spans=spans)
    end.record()
    parts = spans.milliseconds()
    assert list(parts) == ["vision", "prefix", "denoise"]
    assert all(value > 0.0 for value in parts.values())
    assert sum(parts.values()) <= begin.elapsed_time(end)
