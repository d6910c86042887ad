"""The full-size benchmark's logic on a tiny network: every engine is then the eager one, so nothing here is about speed."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vivace.check import (
    bench,
    hopper,
    hopper_client,
    hopper_engines,
    hopper_estimate,
    hopper_machine,
    hopper_proof,
    hopper_robot,
    hopper_rows,
    hopper_run,
    hopper_served,
    hopper_soak,
    hopper_warm,
    hopper_weights,
    results,
)
from vivace.check.targets import SIZES as SETTINGS
from vivace.check.targets import Size
from vivace.checkpoints.names import expected_shapes
from vivace.checkpoints.random_values import OUTLIER_GAIN, distribution, outlier_channels
from vivace.checkpoints.sizes import SIZES
from vivace.errors import ConfigError, NumericsError, VivaceError
from vivace.ops.layers import Fp8Linear
from vivace.precision import plan as plans

CPU = torch.device("cpu")
SERVED = [hopper_rows.BOUNDARIES[one] for one in hopper_client.CLIENTS if hopper_served.why_not(one) is None]
CONFIG = SIZES["tiny"].model
SMALL = ("--network", "tiny", "--device", "cpu", "--observations", "2", "--draws", "2", "--calibration", "2",
         "--calls", "4", "--host-calls", "3", "--few-calls", "3", "--few-observations", "1",
         "--reuse-calls", "3")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cold():
    """Nothing here is about speed: engines need not settle before they are timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_rows, "WARM_UP", bench.WarmUp(max_calls=2))
        yield


def draw(name, **changes):
    given = {"seed": 0, "outliers": 2, "device": CPU} | changes
    return hopper_weights.device_tensor(name, expected_shapes(CONFIG)[name], **given)


@pytest.fixture(scope="module")
def network():
    return hopper_weights.load(
        hopper_weights.random_checkpoint(CONFIG, seed=0, outliers=2), device=CPU, precision="bfloat16"
    )


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    out = tmp_path_factory.mktemp("hopper") / "h.json"
    said = []
    options = hopper.options_of(hopper.parser().parse_args(["--out", str(out), "--settings", "1,48,50;2,0,6", *SMALL]))
    made = hopper.run(options, size="tiny", device="cpu", tell=said.append)
    assert json.loads(out.read_text()) == results.jsonable(made), "the file is the document"
    return made


# --- weights ------------------------------------------------------------------------------------------------------


def test_a_tensor_is_a_function_of_seed_and_name():
    name = "prefix.layers.0.mlp.down.weight"
    assert torch.equal(draw(name), draw(name))
    assert not torch.equal(draw(name), draw(name, seed=1))
    assert not torch.equal(draw(name)[:8, :8], draw("prefix.layers.1.mlp.down.weight")[:8, :8])


def test_the_distribution_is_that_of_made_checkpoints():
    for name in ("prefix.layers.0.attn.q.weight", "vision.layers.0.norm1.weight", "embedding.weight", "projector.bias"):
        shape = expected_shapes(CONFIG)[name]
        center, scale = distribution(name, shape)
        value = draw(name).float()
        assert value.mean().item() == pytest.approx(center, abs=5 * scale / value.numel() ** 0.5 + 1e-3)
        assert value.std().item() == pytest.approx(scale, rel=0.35)


def test_outlier_rows_are_the_same_channels_in_all_layers_of_a_stack():
    name = "prefix.layers.{}.mlp.down.weight"
    loud = outlier_channels(name.format(0), CONFIG.prefix.width, seed=0, outliers=2)
    for layer in (0, 1):
        plain, value = draw(name.format(layer), outliers=0).float(), draw(name.format(layer)).float()
        ratio = value.norm(dim=1) / plain.norm(dim=1)
        assert ratio[list(loud)].tolist() == pytest.approx([OUTLIER_GAIN] * 2, rel=0.02)
        assert np.delete(ratio.numpy(), loud) == pytest.approx(1.0)


def test_float32_and_bfloat16_start_from_the_same_weights(network):
    wide = hopper_weights.load(
        hopper_weights.random_checkpoint(CONFIG, seed=0, outliers=2), device=CPU, precision="float32"
    )
    for (name, a), b in zip(wide.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b.float()), name


def test_a_twin_shares_tensors_and_not_layers(network):
    twin = hopper_weights.twin(network)
    before = network.prefix.block(0).down
    twin.prefix.block(0).down = None
    assert network.prefix.block(0).down is before
    assert all(a is b for a, b in zip(twin.vision.parameters(), network.vision.parameters(), strict=True))
    assert twin.ops is network.ops


# --- requests -----------------------------------------------------------------------------------------------------


def test_requests_have_exactly_the_settings_size():
    tokenizer = hopper_robot.toy_tokenizer(CONFIG.vocab_size)
    scenes = hopper_robot.Scenes.make(6, views=3, image_size=224, seed=0)
    for size in SETTINGS.values():
        pipe = hopper_robot.pipeline(size, CONFIG, tokenizer)
        for index in range(6):
            request = hopper_robot.request(pipe, size, scenes, index)
            inputs = hopper_engines.model_inputs(pipe, request, device=CPU)
            assert inputs.tokens.shape == (1, size.prompt_tokens)
            assert inputs.images.shape == (1, size.views, 3, 224, 224)
            assert inputs.images.dtype == torch.uint8
    with pytest.raises(ConfigError, match="no prompt of this length"):
        hopper_robot.fitted(hopper_robot.pipeline(SETTINGS["2,48,10"], CONFIG, tokenizer), np.zeros(7, np.float32),
                            tokens=8, start="push")  # fmt: skip


# --- engines, rows, proofs ------------------------------------------------------------------------------------------


def engine_of(network, plan=None):
    return hopper_engines.make(hopper_engines.OURS, network, plan=plan)


def some_request(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (1, 1, 3, 224, 224), dtype=torch.uint8, generator=generator)
    return hopper_engines.ModelInputs(images, torch.randint(0, 512, (1, 5), generator=generator))


def test_a_plan_touches_only_its_own_engine(network):
    ranges = hopper_engines.ranges_of(network, [(some_request(), torch.randn(1, 5, 32))])
    (plan,) = hopper_engines.plans_of(["fp8-all"], ranges, data="test")
    before = hopper_weights.weight_bytes(network)
    engine = engine_of(network, plan)
    assert isinstance(engine.model.prefix.block(0).down, Fp8Linear)
    assert not isinstance(network.prefix.block(0).down, Fp8Linear)
    assert engine.family == "fp8"
    assert engine.weights_bytes < before == hopper_weights.weight_bytes(network)
    shares = hopper_rows.fp8_shares(engine)
    assert 0.2 < shares[0] < 1.0, "pixels stay in float32"
    assert shares[1] == 1.0
    assert hopper_rows.fp8_shares(engine_of(network)) == [0.0, 0.0, 0.0]
    plain, small = (hopper_rows.plan_costs(e, Size(1, 5, 5)) for e in (engine_of(network), engine))
    assert [a.flops for a in plain] == [b.flops for b in small]
    assert all(b.weight_bytes < a.weight_bytes for a, b in zip(plain, small, strict=True))
    (plan,) = hopper_engines.plans_of(["int8-full"], ranges, data="test")
    whole = engine_of(network, plan)
    assert hopper_rows.fp8_shares(whole) == [0.0, 1.0, 0.0]
    costs = hopper_rows.plan_costs(whole, Size(1, 5, 5))
    assert [b.weight_bytes < a.weight_bytes for a, b in zip(plain, costs, strict=True)] == [False, True, False]


def test_reference_in_batches_equals_one_by_one(network):
    wide = hopper_weights.load(
        hopper_weights.random_checkpoint(CONFIG, seed=0, outliers=2), device=CPU, precision="float32"
    )
    samples = hopper_proof.Samples([some_request(i) for i in range(3)], torch.randn(3, 2, 5, 32))
    together = hopper_proof.reference(wide, samples, at_once=2)
    alone = hopper_proof.actions_of(engine_of(wide), samples)
    assert together.shape == alone.shape == (3, 2, 5, 32)
    assert (together - alone).abs().max() < 1e-4


def test_scores_see_one_bad_sample_and_refuse_nan():
    truth = torch.randn(4, 3, 5, 32)
    assert hopper_proof.scores(truth, truth) == {
        "cosine_mean": pytest.approx(1.0), "cosine_worst": pytest.approx(1.0), "rel_l2": 0.0, "rel_l2_worst": 0.0,
    }  # fmt: skip
    bad = truth.clone()
    bad[2, 1] *= -1
    found = hopper_proof.scores(bad, truth)
    assert found["cosine_worst"] == pytest.approx(-1.0)
    assert found["cosine_mean"] == pytest.approx(10 / 12)
    assert found["rel_l2_worst"] == pytest.approx(2.0)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError):
        hopper_proof.scores(bad, truth)


def test_repeats_see_a_replay_that_did_not_write():
    repeats = hopper_rows.Repeats()
    output = torch.ones(3)
    repeats.see("a", output, poison=True)
    assert output.isnan().all(), "poisoned"
    repeats.see("a", output, poison=True)  # nobody wrote it again
    repeats.see("a", torch.ones(3), poison=True)
    assert (repeats.same["a"], repeats.calls["a"]) == (2, 3)


def test_repeats_see_other_bits_of_a_policy_and_leave_its_answer_alone():
    repeats = hopper_rows.Repeats()
    answer = np.ones(3)
    for value in (answer, np.ones(3), np.full(3, 1.0 + 1e-15)):
        repeats.see("a", value, poison=False)
    assert (answer == 1).all()
    assert (repeats.same["a"], repeats.calls["a"]) == (2, 3)


class Graphed(hopper_engines.CompiledGraph):
    """Stands for an engine with graphs, on a CPU: answers are written to one tensor, unless it skips its work."""

    def __init__(self, model, *, skip_after=10**9, wrong_infer=False, wrong_after_look=False):
        self.model, self.calls, self.skip_after, self.wrong_infer = model, 0, skip_after, wrong_infer
        self.wrong_after_look, self.looked = wrong_after_look, False
        self.inner = hopper_engines.Plain(hopper_engines.eager.create(model, hopper_engines.CONFIG), CPU)
        self.held = torch.empty(1, 5, 32)

    def _replay(self, inputs, noise):
        self.calls += 1
        if self.calls <= self.skip_after:
            self.held.copy_(self.inner.infer(inputs, noise))
        return self.held

    def infer(self, inputs, noise, **_):
        looked, self.looked = self.looked, False
        return self._replay(inputs, noise) + float(self.wrong_infer or (looked and self.wrong_after_look))

    def prefill(self, inputs, **_):
        return self.inner.prefill(inputs)

    def denoise(self, cache, noise, **more):
        return self.inner.denoise(cache, noise, **more)

    def graph_of(self, inputs, noise):
        return lambda: self._replay(inputs, noise)

    def look(self, images):
        self.looked = True

    def graph_results(self):
        return [self.held]


def graphed(network, **how):
    return replace(engine_of(network), backend=Graphed(network, **how))


def test_an_engine_that_skips_its_work_while_it_is_timed_misses_a_mark(network):
    noise = torch.randn(1, 5, 32)
    good, lazy = (graphed(network, **how) for how in ({}, {"skip_after": 3}))
    for engine, met in ((good, True), (lazy, False)):
        run = hopper_rows.Timed(engine, engine.backend.graph_of(some_request(), noise), 5)
        (row,) = hopper_rows.time_rows(Size(1, 5, 5), "B0", [run])
        assert row["bit_identical"]["output_poisoned"]
        same = next(one for one in row["targets"] if "bits" in one.what)
        assert same.must_met == met
    plain = engine_of(network)
    (row,) = hopper_rows.time_rows(
        Size(1, 5, 5), "B0", [hopper_rows.Timed(plain, plain.backend.graph_of(some_request(), noise), 2)]
    )
    assert not row["bit_identical"]["output_poisoned"], "it makes a new tensor every time: NaN would prove nothing"


def test_an_engine_that_never_settles_misses_a_mark(network, monkeypatch):
    engine, noise = engine_of(network), torch.randn(1, 5, 32)
    monkeypatch.setattr(hopper_rows, "WARM_UP", bench.WarmUp(max_calls=3))
    run = hopper_rows.Timed(engine, engine.backend.graph_of(some_request(), noise), 2)
    (row,) = hopper_rows.time_rows(Size(1, 5, 5), "B0", [run])
    assert not row["stable"]
    assert not next(one for one in row["targets"] if "settled" in one.what).must_met


def test_only_b0_is_launched_behind_a_spin(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "CudaTimer", lambda *, spin_ms=0.0: asked.append(spin_ms))
    for boundary in ("B0", "B1", "B2"):
        hopper_rows.timer_of(boundary)
    assert asked == [bench.SPIN_MS, 0.0, 0.0]


def test_graphs_whose_memory_is_not_known_are_not_called_proven(network):
    with pytest.raises(ConfigError, match="cannot be poisoned"):
        hopper_proof.poisoned(graphed(network), some_request(), torch.randn(1, 5, 32))


def test_accuracy_is_that_of_infer_and_infer_must_equal_two_calls(network):
    samples = hopper_proof.Samples([some_request(i) for i in range(3)], torch.randn(3, 2, 5, 32))
    right = graphed(network)
    assert hopper_proof.two_calls(right, samples) == {"same": 3, "of": 3}
    for how in ("wrong_infer", "wrong_after_look"):
        wrong = graphed(network, **{how: True})
        assert hopper_proof.two_calls(wrong, samples) == {"same": 0, "of": 3}
        assert torch.equal(hopper_proof.actions_of(wrong, samples), hopper_proof.actions_of(right, samples) + 1)


def test_memory_is_poisoned_before_every_way_to_the_actions(network, monkeypatch):
    """Each way as often as asked for, and one that reads what it should not fails by name."""
    engine, noise = engine_of(network), torch.randn(1, 5, 32)
    row = hopper_proof.poisoned(engine, some_request(), noise, replays=2, chunking=hopper_proof.CHUNKING)
    assert row["passed"]
    assert row["ways"] == {
        name: {"replays": 2, "same": 2}
        for name in ("infer", "look, infer", "prefill, denoise", "look, infer, trained", "look, infer, guided")
    }
    assert (row["replays"], row["same"]) == (10, 10)
    answers = iter(range(100))
    monkeypatch.setattr(hopper_proof, "served", lambda *_: torch.full((1, 5, 32), float(next(answers))))
    row = hopper_proof.poisoned(engine, some_request(), noise, replays=2)
    assert not row["passed"]
    assert {name: way["same"] for name, way in row["ways"].items()} == {
        "infer": 2, "look, infer": 0, "prefill, denoise": 2,
    }  # fmt: skip


def test_chunking_reaches_the_actions(network):
    engine, noise = engine_of(network), torch.randn(1, 5, 32)
    ways = hopper_proof._ways(engine, some_request(), noise, hopper_proof.CHUNKING)
    plain, trained, guided = (ways[name]() for name in ("look, infer", "look, infer, trained", "look, infer, guided"))
    assert torch.equal(plain, ways["infer"]())
    assert len({one.sum().item() for one in (plain, trained, guided)}) == 3


def test_attention_stays_in_bfloat16_in_the_floor_of_every_plan(network):
    ranges = hopper_engines.ranges_of(network, [(some_request(), torch.randn(1, 5, 32))])
    engine = engine_of(network, hopper_engines.plans_of(["fp8-all"], ranges, data="test")[0])
    stages = {"vision": 1.0, "prefix": 1.0, "denoise": 1.0}
    endless = {"bf16_tflops": 1.0, "fp8_tflops": 1e12, "copy_gb_s": 1e12}
    size = Size(1, 5, 5)
    found = hopper_rows.rates(engine, size, stages, endless)
    cost = hopper_rows.plan_costs(engine, size)[1]
    assert found["prefix"]["fp8_share"] == pytest.approx(1 - cost.attention_flops / cost.flops)
    assert found["prefix"]["floor_ms"] == pytest.approx(cost.attention_flops / 1e12 * 1e3)


def test_an_engine_that_computes_something_else_is_not_timed(network):
    engine, truth = engine_of(network), torch.randn(5, 32)
    assert hopper_rows.wrong(engine, truth, truth) is None
    assert "wanted at least" in hopper_rows.wrong(engine, -truth, truth)
    assert "nan" in hopper_rows.wrong(engine, torch.full((5, 32), float("nan")), truth)


def test_a_stale_engine_is_not_fresh(network):
    engine, noise = engine_of(network), torch.randn(1, 5, 32)
    assert all(hopper_proof.fresh(engine, some_request(), noise).values())

    class Stale(hopper_engines.Plain):
        def infer(self, inputs, noise, **_):
            self.kept = getattr(self, "kept", None)
            self.kept = super().infer(inputs, noise) if self.kept is None else self.kept
            return self.kept

    stale = replace(engine, backend=Stale(engine.backend, CPU))
    assert not hopper_proof.fresh(stale, some_request(), noise)["image"]


def test_pictures_that_a_look_does_not_send_are_not_fresh(network):
    """The whole graph reads its pixels itself; what a robot gets reads what the last `look` has left."""
    engine, noise = engine_of(network), torch.randn(1, 5, 32)

    class Blind(hopper_engines.Plain):
        seen, after_look = None, False

        def look(self, images):
            self.seen, self.after_look = images if self.seen is None else self.seen, True

        def infer(self, inputs, noise, **more):
            after, self.after_look = self.after_look, False
            return super().infer(replace(inputs, images=self.seen) if after else inputs, noise, **more)

    blind = Blind(engine.backend, CPU)
    del blind.look  # the one that does nothing
    found = hopper_proof.fresh(replace(engine, backend=blind), some_request(), noise)
    assert {what: good for what, good in found.items() if "back" not in what} == {
        "image": False, "noise": True, "last view alone": False, "last prompt token": True,
    }  # fmt: skip


def test_engines_are_rehearsed_with_a_prompt_that_leaves_room_in_its_bucket(network):
    """So that masks are read from then on, as after a server's warm-up; not without graphs, nor without a prompt."""
    asked = []

    class Asked(Graphed):
        def infer(self, inputs, noise, **_):
            asked.append(inputs.tokens.shape[1])
            return super().infer(inputs, noise)

    engine = replace(engine_of(network), backend=Asked(network))
    inputs, noise = some_request(), torch.randn(1, 5, 32)
    hopper_engines.as_served(engine, inputs, noise)
    assert asked == [4]
    hopper_engines.as_served(engine, replace(inputs, tokens=inputs.tokens[:, :0]), noise)
    hopper_engines.as_served(engine_of(network), inputs, noise)
    assert asked == [4]


def test_another_gpu_than_the_first_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="set CUDA_VISIBLE_DEVICES=1"):
        hopper.run(tiny(tmp_path, "1,48,5"), device="cuda:1", tell=lambda _: None)


def soak_of(network, **how):
    engine = graphed(network, **how)
    return engine, hopper_soak.work_of(engine, some_request(), torch.randn(1, 5, 32))


def missed_of(row):
    return [one.what for one in row["targets"] if not one.must_met and one.what != "p99 / p50"]


def test_soak_goes_through_infer_and_a_share_through_the_policy(network):
    engine, work = soak_of(network)
    asked = []
    work = work.with_policy(lambda: asked.append(1) or np.ones((5, 32), np.float32))
    row = hopper_soak.soak_row(SETTINGS["3,200,50"], engine, work, calls=100)
    assert (row["calls"], row["policy_calls"], len(asked)) == (100, 10, 30)
    assert engine.backend.calls == 20 + 90
    assert len(row["p50_of_tenths_ms"]) == 10
    assert row["checks"] == {"same": 2, "of": 2, "output_poisoned": True}
    assert row["policy_latency"].samples == 10
    assert missed_of(row) == []


def test_soak_sees_work_that_is_skipped_and_a_policy_that_changes(network):
    engine, work = soak_of(network, skip_after=30)
    row = hopper_soak.soak_row(SETTINGS["3,200,50"], engine, work, calls=101)
    assert missed_of(row) == ["checks with the bits of the first call"], "the poisoned buffer was not written again"
    engine, work = soak_of(network)
    answers = iter(range(1000))
    work = work.with_policy(lambda: np.full((5, 32), next(answers), np.float32))
    row = hopper_soak.soak_row(SETTINGS["3,200,50"], engine, work, calls=100)
    assert missed_of(row) == ["checks with the bits of the first call"]


@pytest.mark.parametrize("which", [0, 1], ids=["allocated", "reserved"])
def test_soak_sees_memory_that_grows(network, monkeypatch, which):
    engine, work = soak_of(network)
    states = iter([[100, 200], [100 + (which == 0), 200 + (which == 1)]])
    monkeypatch.setattr(hopper_soak, "_memory", lambda cuda: next(states))
    row = hopper_soak.soak_row(SETTINGS["3,200,50"], engine, work, calls=10)
    assert missed_of(row) == [f"growth of {('allocated', 'reserved')[which]} memory, bytes"]


def test_memory_is_judged_on_what_is_reserved(monkeypatch):
    """A graph's private pool is reserved and not allocated: the mark must see it."""
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1010)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 1200)
    calls = []
    peaks = hopper_machine.serving_peaks(lambda: calls.append(1), needed=1000)
    assert len(calls) == 20
    assert peaks == {
        "peak_serving_bytes": 1010, "peak_reserved_bytes": 1200, "ratio_allocated": 1.01, "ratio": 1.2,
    }  # fmt: skip
    assert [mark.must_met for mark in hopper_machine.memory_marks(peaks, 1000)] == [False]
    with pytest.raises(NumericsError, match="less memory is reserved than weights"):
        hopper_machine.serving_peaks(lambda: None, needed=1300)


def test_memory_is_measured_in_a_process_that_did_nothing_else(monkeypatch):
    peaks = {"peak_reserved_bytes": 1100, "needed_bytes": 1000, "ratio": 1.1}
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"times": {}, "memory": peaks}), "")

    monkeypatch.setattr(hopper_machine.subprocess, "run", run)
    row = hopper_machine.memory_row(Size(3, 200, 50), None, seed=0, outliers=16, timeout_s=5.0)
    assert asked[0][-4:] == ["3,200,50", "0", "16", "one"]
    assert (row["engine"], row["ratio"], row["targets"][0].must_met) == ("cuda_graph bf16", 1.1, True)


def test_a_start_ends_when_every_bucket_is_warm():
    row = {"caches": "warm", "first_action_s": 20.0, "every_bucket_s": 31.0, "peak_reserved_bytes": 1100}
    ready, memory = hopper_machine.start_marks(row | {"needed_bytes": 1000})
    assert (ready.must_met, memory.must_met) == (False, True)
    assert hopper_machine.start_marks(row | {"needed_bytes": 1000, "every_bucket_s": 29.0})[0].must_met


def test_keys_and_values_of_the_full_size():
    config = SIZES["full"].model
    assert hopper_rows.kv_bytes(config, Size(3, 200, 50)) == 18 * 2 * 968 * 256 * 2


# --- the whole ------------------------------------------------------------------------------------------------------


def test_rows_of_every_engine_and_boundary(document):
    """Every plan in the first setting, at B0; the headline plans everywhere; reuse where the chunk is 50."""
    found = {(r["setting"], r["engine"], r["boundary"]) for r in document["rows"]}
    head = ("cuda_graph bf16", "cuda_graph fp8-all")
    assert found == {
        *(("1,48,50", f"cuda_graph {name}", "B0") for name in hopper.PLANS),
        *(("1,48,50", engine, boundary) for engine in head for boundary in ("B0 reuse", "B1", "B2", *SERVED)),
        *(("2,0,6", engine, boundary) for engine in head for boundary in ("B0", "B1")),
    }
    assert [r["boundary"] for r in document["rows"]][:7] == ["B0"] * 7, "the numbers that count come first"
    assert "no B2 and B3 for 2,0,6" in document["remarks"][0]
    for row in document["rows"]:
        t = row["latency"]
        assert 0 < t["min_ms"] <= t["p50_ms"] <= t["p95_ms"] <= t["p99_ms"] <= t["max_ms"]
        assert row["calls"] == t["samples"] > 0
        assert row["bit_identical"]["same"] == row["bit_identical"]["of"] >= row["calls"]
        assert not row["bit_identical"]["output_poisoned"], "plain PyTorch makes new tensors"
        assert any("bits" in one["what"] for one in row["targets"])
        if row["boundary"] == "B2":
            assert {"total", "preprocess", "postprocess"} <= set(row["parts_ms"])
        if row["boundary"] in SERVED:
            assert 0 < row["server_p50_ms"] < t["p50_ms"], "the round trip holds the inference"
            inner = next(r for r in document["rows"] if r["boundary"] == "B2" and r["engine"] == row["engine"])
            assert row["added_ms"] == pytest.approx(t["p50_ms"] - inner["latency"]["p50_ms"])
            judged = [one["got"] for one in row["targets"] if one["what"] == "B3 - B2, ms"]
            assert judged == ([row["added_ms"]] if row["boundary"] == "B3" else []), "openpi's client is not ours"
        if row["boundary"] == "B0":
            assert set(row["stages_ms"]) == set(row["rates"]) == {"vision", "prefix", "denoise"}
            assert all(rate["tflop_s"] > 0 and rate["floor_ms"] > 0 for rate in row["rates"].values())
        if row["boundary"] == "B0 reuse":
            assert any("reuses the prefix" in one["what"] for one in row["targets"])
    full, few = (
        next(r for r in document["rows"] if r["engine"] == e) for e in ("cuda_graph fp8-all", "cuda_graph fp8-mlp")
    )
    assert (full["calls"], few["calls"]) == (4, 3)


def test_coverage_of_every_engine_stands_in_the_result(document):
    found = {(row["setting"], row["engine"]): row for row in document["coverage"]}
    assert len(found) == len(hopper.PLANS) + 2
    plain, small = found["1,48,50", "cuda_graph bf16"], found["1,48,50", "cuda_graph fp8-all"]
    assert "e4m3" not in plain["summary"]["flops_by_precision"]
    less = found["1,48,50", "cuda_graph fp8-mlp"]["summary"]["flops_by_precision"]["e4m3"]
    assert small["summary"]["flops_by_precision"]["e4m3"] > less > 0
    assert sum(part["flops_share"] for part in small["parts"]) == pytest.approx(1.0)
    assert all(not row["summary"]["fallbacks"] for row in found.values())
    assert all(mark["must_met"] for row in found.values() for mark in row["targets"])


def test_accuracy_stands_beside_plain_bfloat16(document):
    assert len(document["accuracy"]) == len(hopper.PLANS) + 2
    for row in document["accuracy"]:
        assert (row["observations"], row["noise_draws"]) == (2 if row["precision"] in ("bf16", "fp8-all") else 1, 2)
        assert 0 < row["plain_bfloat16"]["rel_l2"] < 0.05
        assert row["cosine_worst"] <= row["cosine_mean"] <= 1.0 + 1e-12
        assert row["infer_is_two_calls"] == {"same": row["observations"], "of": row["observations"]}
        assert any("denoise(prefill)" in one["what"] for one in row["targets"])
    by = {r["precision"]: r["rel_l2"] for r in document["accuracy"] if r["setting"] == "1,48,50"}
    assert by["bf16"] < by["fp8-mlp"] < by["fp8-all"]


def test_proofs_passed_and_what_needs_a_gpu_is_named(document):
    assert len(document["proof"]) == 4
    assert all(row["passed"] and len(row["targets"]) == 2 for row in document["proof"])
    assert "state" in document["proof"][0]["fresh_policy"]
    assert [row["phase"] for row in document["not_run"]] == ["rivals", "soak", "memory", "start"]
    assert not document["passed"]
    assert document["environment"]["cpu"]["model"]
    assert set(document["phase_seconds"]) >= {"setup", "rows", "accuracy", "proof"}
    assert document["setup"]["estimated_s"]["rows"] > 0


def test_a_proof_that_fails_fails_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(hopper_proof, "fresh", lambda *_: {"image": False, "image, and back": True})
    document = hopper.run(tiny(tmp_path, "1,48,5"), phases=["proof"], size="tiny", device="cpu", tell=lambda _: None)
    assert not document["proof"][0]["passed"]
    assert any("changes of the request" in line for line in document["missed"])
    assert not document["passed"]


def tiny(tmp_path, settings, *more):
    arguments = ["--out", str(tmp_path / "h.json"), "--settings", settings, "--plans", "bf16", *SMALL, *more]
    return hopper.options_of(hopper.parser().parse_args(arguments))


def test_the_default_command_fits_its_time_and_few_calls_are_shorter():
    options = hopper.options_of(hopper.parser().parse_args(["--out", "h.json"]))
    estimated = hopper_estimate.seconds(options, list(hopper.PHASES))
    assert set(estimated) == {"setup", *hopper.PHASES}
    assert sum(estimated.values()) <= options.seconds <= 2100
    calls = (options.calls, options.host_calls, options.few_calls, options.reuse_calls)
    assert min(*calls, options.rival_calls, options.plain_calls) == 1000
    more = replace(options, host_calls=5000)
    assert sum(hopper_estimate.seconds(more, list(hopper.PHASES)).values()) > options.seconds
    assert hopper_estimate.seconds(options, ["rows"])["rows"] < hopper_estimate.seconds(more, ["rows"])["rows"]


def test_a_bug_of_the_benchmark_is_no_line_of_a_result(tmp_path, monkeypatch):
    """Refusals, CUDA errors and processes that fail are written down; a mistyped name is not."""
    run = hopper_run.Run(
        options=tiny(tmp_path, "1,48,5"), config=CONFIG, device=CPU, checkpoint=None, network=None, tokenizer=None,
        scenes=None, document={"not_run": []}, begin=0.0, tell=lambda _: None,
    )  # fmt: skip
    for error in (
        VivaceError("x"),
        torch.OutOfMemoryError("x"),
        subprocess.TimeoutExpired("x", 1.0),
        FileNotFoundError(),
    ):
        with hopper_run.guarded(run, "rows", "x"):
            raise error
    assert len(run.document["not_run"]) == 4
    clock = iter((0.0, 10.0, 14.0, 25.0))
    monkeypatch.setattr(hopper_run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with hopper_run.guarded(run, "rivals", "x"), hopper_run.guarded(run, "rivals", "x of x"):
        pass
    assert run.document["phase_seconds"]["rivals"] == 14.0, "the inner one is part of the outer one"
    monkeypatch.undo()
    for bug in (NameError("x"), TypeError("x"), AttributeError("x"), KeyError("x")):
        with pytest.raises(type(bug)), hopper_run.guarded(run, "rows", "x"):
            raise bug


def test_a_failing_engine_becomes_a_line_and_the_rest_goes_on(tmp_path, monkeypatch):
    real = hopper_engines.Plain.infer

    def broken(self, inputs, noise, **more):
        if inputs.images.shape[1] == 2:
            raise VivaceError("this engine is broken")
        return real(self, inputs, noise, **more)

    monkeypatch.setattr(hopper_engines.Plain, "infer", broken)
    arguments = ["--out", str(tmp_path / "h.json"), "--settings", "2,48,5;1,48,5", "--plans", "bf16", *SMALL]
    options = hopper.options_of(hopper.parser().parse_args(arguments))
    document = hopper.run(options, phases=["rows"], size="tiny", device="cpu", tell=lambda _: None)
    assert document["not_run"][0]["what"] == "2,48,5 bf16"
    assert "this engine is broken" in document["not_run"][0]["why"]
    assert {row["setting"] for row in document["rows"]} == {"1,48,5"}


def test_no_time_is_said_and_not_silently_less(tmp_path):
    arguments = ["--out", str(tmp_path / "h.json"), "--settings", "1,48,5", "--plans", "bf16", *SMALL, "--seconds", "0"]
    options = hopper.options_of(hopper.parser().parse_args(arguments))
    document = hopper.run(options, phases=["rows"], size="tiny", device="cpu", tell=lambda _: None)
    assert "0 s left of 0 s" in document["not_run"][0]["why"]
    assert document["rows"] == []


def test_unknown_phases_and_a_missing_gpu_are_errors(tmp_path):
    options = hopper.options_of(hopper.parser().parse_args(["--out", str(tmp_path / "h.json")]))
    with pytest.raises(ConfigError, match="unknown phase"):
        hopper.run(options, phases=["rowz"], device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
            hopper.run(options)


def test_plan_files_bring_their_own_ranges_or_get_some(tmp_path):
    bare = plans.PrecisionPlan("x", rules=(plans.Rule("prefix.layers.0.mlp.*"),))
    (tmp_path / "mine.json").write_text(bare.to_json())
    arguments = [
        "--out",
        str(tmp_path / "h.json"),
        "--settings",
        "1,48,5",
        "--plans",
        f"bf16,{tmp_path / 'mine.json'}",
        *SMALL,
    ]
    options = hopper.options_of(hopper.parser().parse_args(arguments))
    document = hopper.run(options, phases=["rows"], size="tiny", device="cpu", tell=lambda _: None)
    row = next(r for r in document["rows"] if r["precision"] == "mine")
    assert row["engine"] == "cuda_graph mine"
    assert row["calls"] == 4, "a plan that somebody names gets all calls"


def test_processes_that_compile_ahead_are_ended_and_failures_are_lines(tmp_path):
    said, helpers = [], []
    for number, code in enumerate(("pass", "raise SystemExit('no compiler')", "import time; time.sleep(60)")):
        log = tmp_path / f"{number}.log"
        with log.open("w") as written:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=written, stderr=written, text=True)
        helpers.append(hopper_warm.Helper(f"job {number}", process, log))
    failed = hopper_warm.finish(helpers, tell=said.append, longest_s=5.0)
    assert said == failed
    assert [line.split(":")[0] for line in failed] == ["compiling ahead job 1", "compiling ahead job 2"]
    assert "no compiler" in failed[0]
    assert all(helper.process.poll() is not None for helper in helpers), "nothing is left running"


def test_settings_are_dealt_among_a_few_processes(monkeypatch):
    commands = []
    monkeypatch.setattr(hopper_warm.subprocess, "Popen", lambda command, **_: commands.append(command))
    sizes = tuple(SETTINGS.values())
    helpers = hopper_warm.begin(sizes, None, rivals=sizes[:1], seed=3, outliers=16)
    assert [command[2:5] for command in commands] == [["vivace.check.hopper_warm", *one] for one in (
        ["cuda_graph", "3,200,50;2,48,10"], ["cuda_graph", "3,16,50;1,48,50"], ["cuda_graph", "2,0,63"],
        ["compiled graph", "3,200,50"],
    )]  # fmt: skip
    assert all(command[5:7] == ["3", "16"] and command[8] == "default" for command in commands)
    assert len(helpers) == 4
    hopper_warm.begin(sizes[:1], None, rivals=(), seed=3, outliers=16)
    assert len(commands) == 5, "no more processes than settings"
