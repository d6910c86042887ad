"""The full-size benchmark's logic on a tiny network: every engine is then the eager one, so nothing here is about speed."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.check import (
    hopper,
    hopper_engines,
    hopper_machine,
    hopper_proof,
    hopper_robot,
    hopper_rows,
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
CONFIG = SIZES["tiny"].model
SMALL = ("--network", "tiny", "--device", "cpu", "--observations", "2", "--draws", "2", "--calibration", "2",
         "--calls", "4", "--host-calls", "3")  # fmt: skip


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
    options = hopper.options_of(hopper.parser().parse_args(["--out", str(out), "--settings", "1,48,5;2,0,6", *SMALL]))
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
    repeats.see("a", output)
    assert output.isnan().all(), "poisoned"
    repeats.see("a", output)  # nobody wrote it again
    repeats.see("a", torch.ones(3))
    assert (repeats.same["a"], repeats.calls["a"]) == (2, 3)


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


def test_soak_reports_growth_drift_and_bits(network):
    engine = engine_of(network)
    row = hopper_machine.soak_row(SETTINGS["3,200,50"], engine, lambda: torch.ones(2), calls=40)
    assert len(row["p50_of_tenths_ms"]) == 10
    assert row["same_bits"]
    assert row["allocated_growth_bytes"] == 0
    outputs = iter(torch.full((2,), float(i // 60)) for i in range(200))
    assert not hopper_machine.soak_row(SETTINGS["3,200,50"], engine, lambda: next(outputs), calls=110)["same_bits"]


def test_keys_and_values_of_the_full_size():
    config = SIZES["full"].model
    assert hopper_rows.kv_bytes(config, Size(3, 200, 50)) == 18 * 2 * 968 * 256 * 2


# --- the whole ------------------------------------------------------------------------------------------------------


def test_rows_of_every_engine_and_boundary(document):
    found = {(r["setting"], r["engine"], r["boundary"]) for r in document["rows"]}
    engines = [f"cuda_graph {name}" for name in hopper.PLANS]
    assert found == {
        *(("1,48,5", engine, boundary) for engine in engines for boundary in ("B0", "B1", "B2")),
        *(("2,0,6", engine, "B0") for engine in engines),
        *(("2,0,6", engine, "B1") for engine in ("cuda_graph bf16", "cuda_graph fp8-all")),
    }
    assert "no B2 for 2,0,6" in document["remarks"][0]
    for row in document["rows"]:
        t = row["latency"]
        assert 0 < t["min_ms"] <= t["p50_ms"] <= t["p95_ms"] <= t["p99_ms"] <= t["max_ms"]
        assert row["calls"] == t["samples"] > 0
        if row["boundary"] != "B2":
            assert row["bit_identical"]["same"] == row["bit_identical"]["of"] >= row["calls"]
        if row["boundary"] == "B2":
            assert {"total", "preprocess", "postprocess"} <= set(row["parts_ms"])
        if row["boundary"] == "B0":
            assert set(row["stages_ms"]) == set(row["rates"]) == {"vision", "prefix", "denoise"}
            assert all(rate["tflop_s"] > 0 and rate["floor_ms"] > 0 for rate in row["rates"].values())
    full, few = (next(r for r in document["rows"] if r["engine"] == e and r["setting"] == "2,0,6")
                 for e in ("cuda_graph fp8-all", "cuda_graph fp8-mlp"))  # fmt: skip
    assert (full["calls"], few["calls"]) == (4, 3)


def test_accuracy_stands_beside_plain_bfloat16(document):
    assert len(document["accuracy"]) == 2 * len(hopper.PLANS)
    for row in document["accuracy"]:
        assert (row["observations"], row["noise_draws"]) == (2, 2)
        assert 0 < row["plain_bfloat16"]["rel_l2"] < 0.05
        assert row["cosine_worst"] <= row["cosine_mean"] <= 1.0 + 1e-12
        assert row["targets"]
    by = {r["precision"]: r["rel_l2"] for r in document["accuracy"] if r["setting"] == "1,48,5"}
    assert by["bf16"] < by["fp8-mlp"] < by["fp8-all"]


def test_proofs_passed_and_what_needs_a_gpu_is_named(document):
    assert len(document["proof"]) == 4
    assert all(row["passed"] for row in document["proof"])
    assert "state" in document["proof"][0]["fresh_policy"]
    assert [row["phase"] for row in document["not_run"]] == ["rivals", "soak", "memory", "start"]
    assert not document["passed"]
    assert document["environment"]["cpu"]["model"]
    assert set(document["phase_seconds"]) >= {"setup", "rows", "accuracy", "proof"}


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
    assert "no time left" in document["not_run"][0]["why"]
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
    assert all(command[5:7] == ["3", "16"] for command in commands)
    assert len(helpers) == 4
    hopper_warm.begin(sizes[:1], None, rivals=(), seed=3, outliers=16)
    assert len(commands) == 5, "no more processes than settings"
