"""The policy as a user meets it: from a checkpoint folder to actions in robot units."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from vivace import errors
from vivace.backends.spans import Spans
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.config import EngineConfig
from vivace.runtime import noise as noise_source
from vivace.runtime import policy as policies
from vivace.types import Camera, PreviousChunk, Trace


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for kind in ("pi0", "pi05"):
        made[kind] = root / kind
        make_checkpoint(made[kind], Recipe(size="tiny", kind=kind, format="lerobot", horizon=10))
    return made


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def policy(request, folders):
    return vivace.load_policy(folders[request.param])


def request_for(policy, seed=0, task="pick up the cube"):
    rng = np.random.default_rng(seed)
    robot = policy.io.embodiment
    views = {camera.view: rng.integers(0, 256, (64, 80, 3), dtype=np.uint8) for camera in robot.cameras}
    state = rng.uniform(-0.5, 0.5, sum(part.size for part in robot.state)).astype(np.float32)
    return vivace.Observation(views=views, state=state, prompt=task, t_obs=12.5)


def test_a_chunk_is_complete(policy):
    chunk = policy.infer(request_for(policy))
    assert chunk.actions.shape == (policy.engine.horizon, policy.engine.action_dim)
    assert chunk.actions_normalized.shape == (policy.engine.horizon, 32)
    assert chunk.t_obs == 12.5
    assert chunk.engine is policy.engine
    parts = ("preprocess", "vision", "prefix", "denoise", "postprocess")
    assert all(chunk.milliseconds[part] > 0 for part in parts)
    assert sum(chunk.milliseconds[part] for part in parts) <= chunk.milliseconds["total"]


def test_the_same_request_gets_the_same_answer_whatever_came_before(policy):
    first = policy.infer(request_for(policy, 1)).actions
    policy.infer(request_for(policy, 2))
    assert np.array_equal(policy.infer(request_for(policy, 1)).actions, first)


def test_seed_and_noise_decide(policy, folders):
    request = request_for(policy)
    folder = folders[policy.engine.policy_kind]
    other = vivace.load_policy(folder, config=EngineConfig(seed=1))
    fresh = vivace.load_policy(folder, config=EngineConfig(seed=None))
    first = policy.infer(request).actions
    assert not np.array_equal(other.infer(request).actions, first)
    assert not np.array_equal(fresh.infer(request).actions, fresh.infer(request).actions)
    noise = np.random.default_rng(3).standard_normal((policy.engine.horizon, 32)).astype(np.float32)
    assert np.array_equal(fresh.infer(request, noise=noise).actions, policy.infer(request, noise=noise).actions)


def test_every_part_of_the_request_matters_to_the_noise(policy):
    prepared = policy.prepare(request_for(policy))
    base = noise_source.fingerprint(prepared)
    pixels = prepared.images.copy()
    pixels[0, 0, 0, 0] += 1
    assert noise_source.fingerprint(replace(prepared, images=pixels)) != base
    assert noise_source.fingerprint(replace(prepared, tokens=prepared.tokens[:-1])) != base
    assert noise_source.fingerprint(replace(prepared, state=prepared.state + 1)) != base


def test_noise_is_standard_normal(policy):
    draws = np.stack([
        noise_source.draw(seed, policy.prepare(request_for(policy)), horizon=50, width=32) for seed in range(40)
    ])  # fmt: skip
    assert abs(draws.mean()) < 4 / np.sqrt(draws.size)
    assert abs(draws.std() - 1) < 4 / np.sqrt(2 * draws.size)


def test_bad_noise_is_refused(policy):
    request = request_for(policy)
    with pytest.raises(vivace.ShapeError, match="noise"):
        policy.infer(request, noise=np.zeros((3, 32), dtype=np.float32))
    with pytest.raises(vivace.ShapeError, match="finite"):
        policy.infer(request, noise=np.full((policy.engine.horizon, 32), np.nan, dtype=np.float32))


def test_a_batch_answers_each_as_alone(policy):
    """Different prompt lengths, and one request without its second camera."""
    requests = [
        request_for(policy, seed, task)
        for seed, task in ((1, "a"), (2, "pick up the very large red cube now"), (3, "b"))
    ]
    first_view = policy.io.embodiment.cameras[0].view
    requests[2] = replace(requests[2], views={first_view: requests[2].views[first_view]})
    together = policy.infer_batch(requests)
    for request, chunk in zip(requests, together, strict=True):
        alone = policy.infer(request).actions
        assert np.abs(chunk.actions - alone).max() <= 1e-5 * np.abs(alone).max()
    assert policy.infer_batch([]) == []


def test_a_batch_of_continued_chunks_answers_each_as_alone(policy):
    """Every row goes on from its own older chunk."""
    requests, horizon = [request_for(policy, seed) for seed in (1, 2)], policy.engine.horizon
    rng = np.random.default_rng(0)
    older, noise = (rng.standard_normal((2, horizon, 32), dtype=np.float32) for _ in range(2))
    together = policy.infer_batch(
        requests, noise=noise, previous=PreviousChunk(torch.from_numpy(older), 3, "trained")
    )  # fmt: skip
    for row, (request, chunk) in enumerate(zip(requests, together, strict=True)):
        previous = PreviousChunk(torch.from_numpy(older[row : row + 1]), 3, "trained")
        alone = policy.infer(request, noise=noise[row], previous=previous)
        assert np.array_equal(chunk.actions_normalized[:3], older[row, :3])
        assert np.abs(chunk.actions - alone.actions).max() <= 1e-5 * np.abs(alone.actions).max()


def test_threads_do_not_mix(policy):
    expected = {seed: policy.infer(request_for(policy, seed)).actions for seed in range(4)}
    wrong = []

    def worker(seed):
        for _ in range(5):
            if not np.array_equal(policy.infer(request_for(policy, seed)).actions, expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []


def test_real_time_chunking_through_the_policy(policy):
    request = request_for(policy)
    older = policy.infer(request).actions_normalized
    previous = PreviousChunk(torch.from_numpy(older + 0.5)[None], 3, "trained")
    chunk = policy.infer(request, previous=previous)
    assert np.allclose(chunk.actions_normalized[:3], older[:3] + 0.5)


def test_trace_shows_the_inside(policy):
    trace = Trace()
    chunk = policy.infer(request_for(policy), trace=trace)
    assert len(trace.velocity) == policy.engine.num_denoise_steps
    assert np.array_equal(trace.x[-1][0].numpy(), chunk.actions_normalized)
    assert trace.cache is not None
    assert trace.prepared is not None


def test_a_policy_that_produces_nan_says_so(folders):
    broken = vivace.load_policy(folders["pi05"])
    with torch.no_grad():
        broken.model.action_out.bias.fill_(float("nan"))
    with pytest.raises(vivace.NumericsError, match="vivace check"):
        broken.infer(request_for(broken))


@pytest.mark.parametrize(("change", "message"), [
    ({"precision": "float8"}, "float32, bfloat16"), ({"device": "gpu"}, "cuda"), ({"backend": "eagr"}, "eager"),
])  # fmt: skip
def test_wrong_settings_are_named(folders, change, message):
    with pytest.raises(vivace.ConfigError, match=message):
        vivace.load_policy(folders["pi05"], config=EngineConfig(**change))


def test_only_replayed_graphs_are_quick(policy, monkeypatch):
    assert policy.quick is False
    monkeypatch.setattr(policy.backend, "name", "cuda_graph")
    assert policy.quick is True


def test_warmup_runs_and_leaves_no_trace(policy):
    before = policy.infer(request_for(policy)).actions
    policy.warmup()
    assert np.array_equal(policy.infer(request_for(policy)).actions, before)


def test_warmup_runs_the_kinds_of_chunking_that_will_come(policy, monkeypatch):
    seen, infer = [], policy.backend.infer

    def noted(inputs, noise, *, previous=None, spans=None):
        seen.append(previous.mode if previous else None)
        return infer(inputs, noise, previous=previous, spans=spans)

    monkeypatch.setattr(policy.backend, "infer", noted)
    policy.warmup([5], chunking=("trained", "guided"))
    assert set(seen) == {None, "trained", "guided"}


def test_warmup_tells_what_the_backend_holds_by_then(policy, monkeypatch):
    monkeypatch.setattr(policy.backend, "describe", lambda: {"graphs_captured": 7})
    policy.warmup([5])
    assert policy.engine.details["graphs_captured"] == 7


def test_stage_times_are_read_before_the_next_request_may_record_them(policy, monkeypatch):
    held = []
    monkeypatch.setattr(Spans, "milliseconds", lambda self: held.append(policy._lock.locked()) or {})
    policy.infer(request_for(policy))
    assert held[0], "the stage times were read after another request could start"


def test_lerobots_vision_in_bfloat16_only_when_asked(folders):
    kept = vivace.load_policy(folders["pi05"], config=EngineConfig(precision="bfloat16"))
    rounded = vivace.load_policy(folders["pi05"], config=EngineConfig(precision="bfloat16+vision"))
    assert kept.model.projector.dtype == torch.float32
    assert rounded.model.projector.dtype == torch.bfloat16
    assert rounded.engine.precision == "bfloat16+vision"
    a, b = (p.infer(request_for(p)).actions_normalized for p in (kept, rounded))
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < 2e-2


def test_steps_come_from_the_engine_then_the_checkpoint(folders):
    assert vivace.load_policy(folders["pi05"]).engine.num_denoise_steps == 10
    assert vivace.load_policy(folders["pi05"], config=EngineConfig(num_denoise_steps=3)).engine.num_denoise_steps == 3


def test_bfloat16_is_near_float32_but_not_equal(folders):
    exact = vivace.load_policy(folders["pi05"], config=EngineConfig(precision="float32"))
    low = vivace.load_policy(folders["pi05"], config=EngineConfig(precision="bfloat16"))
    request = request_for(exact)
    a, b = exact.infer(request).actions_normalized, low.infer(request).actions_normalized
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 0 < error < 2e-2
    assert low.engine.precision == "bfloat16"


def test_guided_chunking_needs_weights_that_fit(policy):
    H = policy.engine.horizon
    good = torch.zeros(1, H, 32)
    bad = {
        "shape": PreviousChunk(torch.zeros(1, 1, 32), 1, "trained"),
        "finite": PreviousChunk(torch.full((1, H, 32), float("nan")), 1, "trained"),
        "delay": PreviousChunk(good, -1, "guided", torch.ones(H)),
        "weight": PreviousChunk(good, 1, "guided"),
        "one weight": PreviousChunk(good, 1, "guided", torch.ones(H + 1)),
    }
    for message, previous in bad.items():
        with pytest.raises(vivace.ShapeError, match=message):
            policy.infer(request_for(policy), previous=previous)


def test_words_as_noise_are_refused(policy):
    with pytest.raises(vivace.ShapeError, match="noise"):
        policy.infer({**dict(wire_request(policy)), "noise": "white"})


def wire_request(policy):
    from vivace.check import observations

    return observations.synthetic(policy.io, 1)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named_before_anything_is_loaded(folders):
    with pytest.raises(vivace.Unsupported, match="0 CUDA devices"):
        vivace.load_policy(folders["pi05"], config=EngineConfig(device="cuda"))
    with pytest.raises(vivace.Unsupported, match="GPU"):
        vivace.load_policy(folders["pi05"], config=EngineConfig(backend="cuda_graph"))


@pytest.mark.parametrize("change", [{"num_denoise_steps": 0}, {"prompt_bucket": 0}, {"num_denoise_steps": -3}])
def test_numbers_that_no_engine_can_run_with_are_refused(change):
    with pytest.raises(vivace.ConfigError, match="at least 1"):
        EngineConfig(**change)


def test_warm_up_feeds_what_robots_send(folders):
    """Pixel type and prompt lengths of the warm-up are those of real requests: nothing is compiled for the first one."""
    policy, seen = vivace.load_policy(folders["pi05"]), []
    prefill = policy.backend.prefill

    def watch(inputs, **more):
        seen.append((inputs.images.dtype, tuple(inputs.images.shape), inputs.tokens.shape[1]))
        return prefill(inputs, **more)

    policy.backend.prefill = watch
    policy.backend.warm_shapes = lambda longest, *, views: ((views[0], 16), (views[0], longest))
    policy.warmup()
    warm = set(seen)
    seen.clear()
    policy.infer(request_for(policy))
    assert {(dtype, shape) for dtype, shape, _ in seen} <= {(dtype, shape) for dtype, shape, _ in warm}
    assert {length for *_, length in warm} == {16, policy.io.max_prompt_tokens}


@pytest.mark.parametrize(("required", "wanted"), [(3, [3]), (2, [3, 2]), (0, [3, 2, 1])])
def test_warm_up_asks_for_every_number_of_pictures_that_may_come(folders, monkeypatch, required, wanted):
    policy, asked = vivace.load_policy(folders["pi05"]), []
    embodiment = policy.io.embodiment
    cameras = tuple(Camera(f"v{i}", f"v{i}", required=i < required) for i in range(3))
    io = replace(policy.io, embodiment=replace(embodiment, cameras=cameras))
    policy.io, policy.pipeline = io, replace(policy.pipeline, io=io)
    monkeypatch.setattr(
        policy.backend, "warm_shapes", lambda longest, *, views: asked.append(list(views)) or ((views[-1], 4),)
    )
    monkeypatch.setattr(policy.backend, "look", lambda images: asked.append(images.shape[1]))
    policy.warmup()
    assert asked[0] == wanted
    assert asked[1] == wanted[-1]


def test_token_ids_beyond_the_embedding_are_refused(policy):
    """On a GPU such an id would end the process for every client, so it must not reach the gather."""
    request = {k: v for k, v in wire_request(policy).items() if k not in ("prompt", "task")}
    bad = np.array([2, policy.checkpoint.model.vocab_size], dtype=np.int32)
    with pytest.raises(vivace.ObservationError, match="tokenized_prompt"):
        policy.infer({**request, "tokenized_prompt": bad, "tokenized_prompt_mask": np.ones(2, bool)})


def test_another_prompt_limit(folders):
    policy = vivace.load_policy(folders["pi0"], max_prompt_tokens=3)
    with pytest.raises(vivace.ObservationError, match="3"):
        policy.infer(request_for(policy))


def test_the_backend_looks_at_the_pictures_before_the_prompt_is_read(policy, monkeypatch):
    """A GPU runs vision while the host tokenises; and what it looked at is the very tensor that it is then asked about."""
    order, seen = [], []
    read, infer = type(policy.pipeline).read, policy.backend.infer
    monkeypatch.setattr(policy.backend, "look", lambda images: (order.append("look"), seen.append(images)))
    monkeypatch.setattr(type(policy.pipeline), "read", lambda self, one: (order.append("read"), read(self, one))[1])
    monkeypatch.setattr(
        policy.backend, "infer", lambda inputs, *a, **k: (seen.append(inputs.images), infer(inputs, *a, **k))[1]
    )
    policy.infer_batch([request_for(policy, 1), request_for(policy, 2)])
    assert order == ["look", "read", "read"]
    assert seen[0] is seen[1]
    policy.infer(request_for(policy), trace=Trace())
    assert order == ["look", "read", "read", "read"], "evidence is taken stage by stage"


def test_a_prompt_that_is_refused_after_the_look_leaves_nothing_behind(policy):
    first = policy.infer(request_for(policy, 1)).actions
    with pytest.raises(errors.ObservationError):
        policy.infer(replace(request_for(policy, 2), prompt="", tokens=np.array([10**6])))
    assert np.array_equal(policy.infer(request_for(policy, 1)).actions, first)


def test_loading_and_building_happen_on_the_networks_device(folders, monkeypatch, devices):
    """Kernels that pack weights and streams of a backend belong to the current device."""
    on, current, seen = *devices, {}

    def noted(name, work):
        return lambda *args, **named: (seen.setdefault(name, list(current)), work(*args, **named))[1]

    monkeypatch.setattr(policies, "on", on)
    monkeypatch.setattr(policies, "load_model", noted("load", policies.load_model))
    monkeypatch.setattr(policies.base, "build", noted("build", policies.base.build))
    vivace.load_policy(folders["pi05"])
    assert seen == {"load": [torch.device("cpu")], "build": [torch.device("cpu")]}
