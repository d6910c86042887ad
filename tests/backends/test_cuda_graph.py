"""Buffers and buckets (CPU), and the graph backend on a GPU: same answers as float32, same bits every time, never stale."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import base, buffers, cuda_graph, eager, graph_slots
from vivace.backends.spans import Spans
from vivace.check import observations
from vivace.check.hopper_weights import twin
from vivace.config import EngineConfig, GemmaConfig, VisionConfig
from vivace.errors import ConfigError, ShapeError, Unsupported
from vivace.precision import plan as plans
from vivace.precision import quantize
from vivace.precision.flavours import parameter_dtype
from vivace.runtime import choice
from vivace.runtime.policy import load_policy
from vivace.types import ModelInputs, PrefixCache, PreviousChunk, Trace

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def request(tokens=5, views=2, size=None, seed=0, device="cpu"):
    g, size = torch.Generator().manual_seed(seed), size or (56 if device == "cpu" else 224)
    images = torch.randint(0, 256, (1, views, 3, size, size), dtype=torch.uint8, generator=g)
    return ModelInputs(images.to(device), torch.randint(0, 64, (1, tokens), generator=g).to(device))


@pytest.mark.parametrize(
    ("tokens", "masked", "wanted"),
    [
        (5, False, (16, True)),
        (16, False, (16, False)),
        (16, True, (16, True)),
        (17, False, (32, True)),
        (0, False, (0, False)),
    ],
)
def test_prompt_is_rounded_up_and_masked_only_when_it_must_be(tokens, masked, wanted):
    inputs = request(tokens)
    if masked:
        inputs = replace(inputs, token_mask=torch.ones(1, tokens, dtype=torch.bool))
    bucket = buffers.bucket_of(inputs, step=16)
    assert (bucket.tokens, bucket.masked) == wanted


def test_a_shorter_request_leaves_nothing_of_the_longer_one_visible():
    long, short = request(14, seed=1), request(3, seed=2)
    bucket = buffers.bucket_of(long, step=16)
    made = buffers.input_buffers(bucket, images=torch.zeros_like(long.images), state_width=32)
    made.fill(long)
    made.fill(short)
    assert made.inputs.token_mask.tolist() == [[True] * 3 + [False] * 13]
    assert torch.equal(made.inputs.tokens[:, :3], short.tokens)
    assert torch.equal(made.inputs.images, short.images)
    made.fill(replace(long, view_mask=torch.tensor([[True, False]])))
    assert made.inputs.view_mask.tolist() == [[True, False]]
    made.fill(short)
    assert made.inputs.view_mask.tolist() == [[True, True]]


def test_padded_bucket_gives_the_same_actions():
    """What the masks promise, on the reference backend: padding changes nothing but the order of float32 sums."""
    config = tiny_config("pi05")
    backend = eager.create(build(config, random_tensors(config)), EngineConfig(num_denoise_steps=2))
    inputs, noise = request(5), torch.randn(1, config.horizon, 32)
    made = buffers.input_buffers(
        buffers.bucket_of(inputs, step=16), images=torch.zeros_like(inputs.images), state_width=32
    )
    made.fill(inputs)
    padded = backend.denoise(backend.prefill(made.inputs), noise)
    assert (padded - backend.denoise(backend.prefill(inputs), noise)).abs().max() < 1e-5


def test_a_cpu_is_refused_with_the_reason():
    assert "need an NVIDIA GPU" in base.why_not("cuda_graph", device="cpu")


def test_without_a_compiler_the_reason_is_said_before_triton_raises(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from vivace.ops import toolchain

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(toolchain, "compiler_missing", lambda: "Triton needs a C compiler")
    assert base.why_not("cuda_graph", device="cuda") == "Triton needs a C compiler"


def test_a_network_in_another_format_is_refused_by_the_name_of_its_layer():
    pytest.importorskip("triton", reason="triton is not installed")
    from vivace.backends import cuda_graph

    config = tiny_config("pi05")
    reason = cuda_graph.why_not_model(build(config, random_tensors(config)))
    assert reason.startswith("vision.layers.0.attn.qkv is torch.float32, the kernels take bfloat16, E4M3 and INT8")
    assert "--precision bfloat16+vision" in reason


def test_the_registry_asks_about_the_network_too(monkeypatch):
    """Judged by name and by "auto" alike: the kernels' module has the reason, and whoever chooses must hear it."""
    pytest.importorskip("triton", reason="triton is not installed")
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    monkeypatch.setattr(cuda_graph, "why_not", lambda *, device: None)
    assert base.why_not("cuda_graph", device="cuda") is None
    assert base.why_not("cuda_graph", device="cuda", model=model) == cuda_graph.why_not_model(model)
    monkeypatch.setattr(base, "BACKENDS", {name: base.BACKENDS[name] for name in ("cuda_graph", "compiled")})
    monkeypatch.setattr(base._load("compiled"), "why_not", lambda *, device: None)
    chosen = choice.backend(EngineConfig(), torch.device("cuda"), model, quantised=False)
    assert chosen.name == "compiled"
    assert "vision.layers.0.attn.qkv is torch.float32" in chosen.passed_over["cuda_graph"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def small_config(kind="pi05", **changes):
    """Real head sizes, real views, widths that the kernels take, few layers."""
    return tiny_config(
        kind, vision=VisionConfig(width=144, layers=2, mlp_width=192, num_heads=2),
        prefix=GemmaConfig(width=256, layers=3, mlp_width=512), expert=GemmaConfig(width=128, layers=3, mlp_width=256),
        horizon=20, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def pair(request):
    """(backend in bfloat16, float32 truth, plain bfloat16) of one network."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    config = small_config(request.param)
    tensors = random_tensors(config)
    engine = EngineConfig(num_denoise_steps=4)

    def bf16(name):
        return parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")

    rounded = {name: value.to(bf16(name)).float() for name, value in tensors.items()}
    truth = eager.create(build(config, rounded, device="cuda"), engine)
    plain = eager.create(build(config, tensors, dtype_of=bf16, device="cuda"), engine)
    made = base.build("cuda_graph", build(config, tensors, dtype_of=bf16, device="cuda"), engine)
    return made, truth, plain


def state_for(inputs):
    return replace(inputs, state=torch.randn(1, 32, generator=torch.Generator().manual_seed(4)).cuda())


def actions(backend, inputs, noise, previous=None):
    return backend.denoise(backend.prefill(inputs), noise, previous=previous)


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16, 23])
def test_error_is_no_larger_than_plain_bfloat16(pair, tokens):
    made, truth, plain = pair
    inputs = state_for(request(tokens, device="cuda"))
    noise = torch.randn(1, 20, 32, device="cuda")
    wanted = actions(truth, inputs, noise)
    assert error(actions(made, inputs, noise), wanted) <= 1.25 * error(actions(plain, inputs, noise), wanted)


@gpu
@pytest.mark.gpu
def test_replay_is_bit_identical_and_equals_the_single_graph(pair):
    made, *_ = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    first = actions(made, inputs, noise)
    assert all(torch.equal(actions(made, inputs, noise), first) for _ in range(200))
    assert torch.equal(made.infer(inputs, noise), first)


@gpu
@pytest.mark.gpu
def test_changing_any_input_changes_the_actions_and_changing_it_back_restores_them(pair):
    made, *_ = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    first, before = actions(made, inputs, noise), made.describe()["graphs_captured"]
    changes = [
        replace(inputs, images=255 - inputs.images), replace(inputs, tokens=(inputs.tokens + 1) % 64),
        replace(inputs, tokens=inputs.tokens[:, :8]), replace(inputs, tokens=inputs.tokens[:, :1]),
    ]  # fmt: skip
    if made.model.config.kind == "pi0":
        changes.append(replace(inputs, state=inputs.state + 1))
    for changed in changes:
        assert not torch.equal(actions(made, changed, noise), first)
    assert not torch.equal(actions(made, inputs, noise + 1), first)
    assert torch.equal(actions(made, inputs, noise), first)
    assert made.describe()["graphs_captured"] == before, "a prompt of another length recaptured"


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["trained", "guided"])
def test_real_time_chunking_reads_delay_and_older_chunk_as_data(pair, mode):
    made, truth, plain = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    older = torch.randn(1, 20, 32, device="cuda")
    for delay in (2, 7):
        weights = torch.linspace(1, 0, 20, device="cuda") if mode == "guided" else None
        previous = PreviousChunk(older, delay, mode, weights)
        wanted = actions(truth, inputs, noise, previous)
        bound = 1.25 * error(actions(plain, inputs, noise, previous), wanted)
        assert error(actions(made, inputs, noise, previous), wanted) <= bound


@gpu
@pytest.mark.gpu
def test_a_foreign_cache_is_refused(pair):
    made, _, plain = pair
    inputs = state_for(request(9, device="cuda"))
    with pytest.raises(ShapeError, match="not made by this backend"):
        made.denoise(plain.prefill(inputs), torch.randn(1, 20, 32, device="cuda"))


@gpu
@pytest.mark.gpu
def test_a_cache_whose_memory_may_be_used_again_is_refused(pair):
    """All graphs share one pool: whatever runs after a prefill may lie where its keys lay."""
    made, *_ = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    for later in (lambda: made.infer(inputs, noise), lambda: made.prefill(state_for(request(20, device="cuda")))):
        cache = made.prefill(inputs)
        first = made.denoise(cache, noise)
        assert torch.equal(made.denoise(cache, noise), first), "reuse of the latest prefix"
        later()
        with pytest.raises(ShapeError, match="came after it"):
            made.denoise(cache, noise)


@gpu
@pytest.mark.gpu
def test_whatever_comes_after_a_look_waits_for_its_vision(pair):
    """Vision runs on a stream of its own, in memory that all graphs share; here it starts late."""
    made, *_ = pair
    noise = torch.randn(1, 20, 32, device="cuda")
    one, other = (state_for(request(9, seed=seed, device="cuda")) for seed in (1, 2))
    three = state_for(request(9, views=3, seed=3, device="cuda"))
    wanted = {id(inputs): made.infer(inputs, noise) for inputs in (one, other, three)}

    def late(images):
        with torch.cuda.stream(made._aside):
            torch.cuda._sleep(30_000_000)
        made.look(images)

    for _ in range(3):
        for later in (one, other, three):
            late(one.images)
            assert torch.equal(made.infer(later, noise), wanted[id(later)])
            late(one.images)
            late(later.images)
            assert torch.equal(made.infer(later, noise), wanted[id(later)])
            late(one.images)
            assert torch.equal(actions(made, later, noise), wanted[id(later)])


@gpu
@pytest.mark.gpu
def test_graphs_outlive_operations_given_to_the_model_later(pair):
    """A second backend on the same network packs weights of its own; those of the first must stay where its graphs read."""
    made, *_ = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    wanted = made.infer(inputs, noise)
    second = base.build("cuda_graph", made.model, EngineConfig(num_denoise_steps=4))
    torch.cuda.empty_cache()
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(255)
    assert torch.equal(second.infer(inputs, noise), wanted)
    assert torch.equal(made.infer(inputs, noise), wanted)


@gpu
@pytest.mark.gpu
def test_quantising_a_network_over_the_same_tensors_leaves_recorded_graphs_alone():
    config = small_config()
    tensors = random_tensors(config)
    one = build(config, tensors, dtype_of=lambda name: parameter_dtype(name, precision="bfloat16", flavour="openpi_torch"),
                device="cuda")  # fmt: skip
    inputs, noise = request(9, device="cuda"), torch.randn(1, 20, 32, device="cuda")
    first = base.build("cuda_graph", one, EngineConfig(num_denoise_steps=4))
    wanted = first.infer(inputs, noise)
    other = twin(one)
    preset = plans.preset("fp8-all")
    plan = replace(preset, amax={layer.name: 20.0 for _, _, layer in quantize.linears(other)})
    quantize.apply(other, plan)
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").fill_(255)
    assert torch.equal(first.infer(inputs, noise), wanted)


@gpu
@pytest.mark.gpu
def test_another_bound_of_the_guidance_is_data_and_no_new_graph(pair):
    made, truth, _ = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    older, weights = torch.randn(1, 20, 32, device="cuda"), torch.linspace(1, 0, 20, device="cuda")
    answers, captured = [], set()
    for bound in (1.0, 5.0, 10.0):
        previous = PreviousChunk(older, 3, "guided", weights, bound)
        answers.append(made.infer(inputs, noise, previous=previous))
        captured.add(made.describe()["graphs_captured"])
        assert error(answers[-1], actions(truth, inputs, noise, previous)) < 0.1
    assert len(captured) == 1
    assert not torch.equal(answers[0], answers[1])


@gpu
@pytest.mark.gpu
def test_evicted_buckets_come_back_with_the_same_bits(pair, monkeypatch):
    made, *_ = pair
    monkeypatch.setattr(graph_slots, "MAX_BUCKETS", 2)
    noise = torch.randn(1, 20, 32, device="cuda")
    # no bucket of one number of pictures can hold a request of another, so each must be recorded again
    requests = [state_for(request(20, views=views, device="cuda")) for views in (1, 2, 3, 4)]
    first = [made.infer(inputs, noise) for inputs in requests]
    assert len(made.describe()["buckets"]) <= 2
    assert all(torch.equal(made.infer(inputs, noise), wanted) for inputs, wanted in zip(requests, first, strict=True))


@gpu
@pytest.mark.gpu
def test_a_request_without_a_graph_of_its_own_is_right_in_a_longer_prompts_bucket(pair):
    made, truth, _ = pair
    noise = torch.randn(1, 20, 32, device="cuda")
    for inputs in (request(9, views=3, device="cuda"), request(150, views=1, device="cuda")):
        made.infer(state_for(inputs), noise)
    before = made.describe()["graphs_captured"]
    short = state_for(request(70, views=1, device="cuda"))
    assert error(made.infer(short, noise), actions(truth, short, noise)) < 0.1
    assert made.describe()["graphs_captured"] == before


@gpu
@pytest.mark.gpu
def test_two_threads_through_a_policy_lock_get_their_own_answers(pair):
    made, *_ = pair
    lock, noise = threading.Lock(), torch.randn(1, 20, 32, device="cuda")
    requests = [state_for(request(5, seed=seed, device="cuda")) for seed in range(4)]
    wanted, wrong = [made.infer(inputs, noise) for inputs in requests], []

    def ask(index):
        for _ in range(50):
            with lock:
                got = made.infer(requests[index], noise, spans=(spans := Spans(cuda=True)))
                spans.milliseconds()
            if not torch.equal(got, wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_too_many_buckets_for_the_longest_prompt_are_refused():
    backend = cuda_graph.CudaGraphBackend.__new__(cuda_graph.CudaGraphBackend)
    backend._step = 8
    with pytest.raises(ConfigError, match="set prompt_bucket to 14 or more"):
        backend.warm_shapes(200, views=[3])
    backend._step = 14
    assert len(backend.warm_shapes(200, views=[3])) < cuda_graph.MAX_BUCKETS


def test_guidance_without_weights_is_refused_and_keeps_nothing_of_the_last_request():
    made = buffers.flow_buffers(1, 6, 32, torch.device("cpu"))
    noise = torch.zeros(1, 6, 32)
    made.fill(noise, PreviousChunk(noise, 2, "guided", torch.ones(6), 3.0))
    assert made.weights.tolist() == [1.0] * 6
    assert made.max_guidance.item() == 3.0
    with pytest.raises(ShapeError, match="weight per action"):
        made.fill(noise, PreviousChunk(noise, 2, "guided"))


def some_buffers(batch):
    bucket = buffers.Bucket(batch, 2, 16, torch.uint8, masked=True)
    images = torch.zeros(batch, 2, 3, 56, 56, dtype=torch.uint8)
    return buffers.input_buffers(bucket, images=images, state_width=32)


@pytest.mark.parametrize("part", ["images", "tokens", "state", "token_mask", "view_mask"])
def test_one_rows_request_does_not_become_a_batchs(part):
    """`copy_` would broadcast it: every robot would get the first one's prompt."""
    pair = {
        "images": torch.zeros(2, 2, 3, 56, 56, dtype=torch.uint8), "tokens": torch.ones(2, 5, dtype=torch.int64),
        "state": torch.zeros(2, 32), "token_mask": torch.ones(2, 5, dtype=torch.bool),
        "view_mask": torch.ones(2, 2, dtype=torch.bool),
    }  # fmt: skip
    some_buffers(2).fill(ModelInputs(**pair))
    with pytest.raises(ShapeError, match=f"{part.replace('_', ' ')} of another size"):
        some_buffers(2).fill(ModelInputs(**{**pair, part: pair[part][:1]}))


def test_one_rows_noise_and_older_chunk_do_not_become_a_batchs():
    made, noise = buffers.flow_buffers(2, 6, 32, torch.device("cpu")), torch.randn(2, 6, 32)
    made.fill(noise, PreviousChunk(noise, 2, "guided", torch.ones(6), 3.0))
    for wrong in (
        (noise[:1], None),
        (noise, PreviousChunk(noise[:1], 2, "trained")),
        (noise, PreviousChunk(noise, 2, "guided", torch.ones(1), 3.0)),
    ):
        with pytest.raises(ShapeError, match="of another size"):
            made.fill(*wrong)


@pytest.mark.parametrize("shape", [(1, 20, 32), (2, 20, 31), (20, 32)])
def test_noise_that_does_not_fit_is_refused_before_anything_is_captured(shape):
    backend = cuda_graph.CudaGraphBackend.__new__(cuda_graph.CudaGraphBackend)
    backend.model = SimpleNamespace(config=tiny_config("pi05"), device=torch.device("cpu"))
    with pytest.raises(ShapeError, match=r"noise does not fit.*wanted \[2, H, 32\]"):
        backend.infer(
            ModelInputs(torch.zeros(2, 2, 3, 56, 56), torch.ones(2, 5, dtype=torch.int64)), torch.zeros(shape)
        )
    with pytest.raises(ShapeError, match=r"noise does not fit.*wanted \[2, H, 32\]"):
        backend.denoise(PrefixCache((torch.zeros(2, 7, 1, 16),), (), torch.tensor([7, 7])), torch.zeros(shape))


def test_pictures_of_another_size_are_refused_by_look():
    backend = cuda_graph.CudaGraphBackend.__new__(cuda_graph.CudaGraphBackend)
    backend.model = SimpleNamespace(device=torch.device("cpu"))
    sight = SimpleNamespace(images=torch.zeros(1, 2, 3, 56, 56, dtype=torch.uint8))
    backend._slots = SimpleNamespace(sight=lambda *_: sight)
    backend._vision, backend._join = (lambda _: None), (lambda: None)
    with pytest.raises(ShapeError, match=r"images of another size; got \[1, 2, 1, 56, 56\]"):
        backend.look(torch.zeros(1, 2, 1, 56, 56, dtype=torch.uint8))


def test_memory_that_runs_out_in_the_warm_up_of_a_graph_is_said_in_our_words(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    recorder = graph_slots.Recorder.__new__(graph_slots.Recorder)
    recorder._stream, recorder.pool, recorder.count = stream, (0, 1), 0

    def work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(Unsupported, match="no memory left for another graph; got CUDA out of memory"):
        recorder(work)
    assert recorder.count == 0


@gpu
@pytest.mark.gpu
def test_a_trace_survives_the_next_request(pair):
    made, *_ = pair
    traces = [Trace(), Trace()]
    made.prefill(state_for(request(9, seed=1, device="cuda")), trace=traces[0])
    kept = traces[0].prefix_embeds.clone()
    made.prefill(state_for(request(9, seed=2, device="cuda")), trace=traces[1])
    assert torch.equal(traces[0].prefix_embeds, kept)
    assert not torch.equal(traces[1].prefix_embeds, kept)


@gpu
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_network_on_another_gpu_than_the_current_one_is_right():
    config = small_config()
    tensors, engine = random_tensors(config), EngineConfig(num_denoise_steps=4)

    def bf16(name):
        return parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")

    answers = []
    for device in ("cuda:0", "cuda:1"):
        made = base.build("cuda_graph", build(config, tensors, dtype_of=bf16, device=device), engine)
        inputs, noise = request(9, device=device), torch.ones(1, 20, 32, device=device)
        made.look(inputs.images)
        answers.append(made.infer(inputs, noise, spans=(spans := Spans(cuda=True))).cpu())
        assert torch.equal(actions(made, inputs, noise).cpu(), answers[-1])
        assert set(spans.milliseconds()) >= {"prefix", "denoise"}
    assert torch.equal(*answers)


@gpu
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_policy_on_another_gpu_than_the_current_one_answers_alike():
    answers = []
    for device in ("cuda:0", "cuda:1"):
        config = EngineConfig(backend="cuda_graph", device=device, precision="bfloat16+vision")
        policy = load_policy("conveyor-small", config=config)
        policy.warmup([20])
        (one,) = observations.synthetic(policy.io, 1, seed=0, prepare=policy.prepare)
        answers.append(policy.infer(one).actions)
    assert np.array_equal(*answers)


@gpu
@pytest.mark.gpu
def test_returned_actions_survive_the_next_call(pair):
    made, *_ = pair
    inputs, noise = state_for(request(9, device="cuda")), torch.randn(1, 20, 32, device="cuda")
    first = actions(made, inputs, noise)
    kept = first.clone()
    actions(made, inputs, noise + 1)
    assert torch.equal(first, kept)
