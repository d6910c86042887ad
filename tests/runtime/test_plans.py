"""A plan enters `load_policy` as a file, changes the policy by what it says, and is refused where it does not belong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.check.observations import synthetic
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.config import EngineConfig
from vivace.errors import ConfigError, Unsupported
from vivace.ops.layers import Fp8Linear
from vivace.precision import calibrate, coverage, plan
from vivace.precision.plan import Rule
from vivace.runtime import choice
from vivace.runtime import coverage as recorded
from vivace.runtime.policy import load_policy
from vivace.serving.protocol import unpack
from vivace.serving.results import metadata_frame


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def checkpoint(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("plans") / request.param
    make_checkpoint(folder, Recipe(size="tiny", horizon=6, kind=request.param))
    return folder


def load(checkpoint, precision):
    return load_policy(checkpoint, config=EngineConfig(precision=str(precision), num_denoise_steps=3, device="cpu"))


@pytest.fixture(scope="module")
def made(checkpoint):
    """(bfloat16 policy, requests, calibrated fp8-all plan)."""
    policy = load(checkpoint, "bfloat16")
    requests = synthetic(policy.io, 3)
    with calibrate.watch(policy.model) as ranges:
        for request in requests:
            policy.infer(request)
    chosen = calibrate.with_ranges(
        plan.preset("fp8-all"), ranges, data="synthetic: 3", checkpoint_hash=policy.engine.checkpoint_hash
    )
    return policy, requests, chosen


def written(tmp_path, chosen):
    path = tmp_path / "plan.json"
    path.write_text(chosen.to_json())
    return path


def test_a_plan_runs_and_the_engine_says_which(checkpoint, made, tmp_path):
    before, requests, chosen = made
    policy = load(checkpoint, written(tmp_path, chosen))
    holders = [m for m in policy.model.modules() if isinstance(m, Fp8Linear)]
    assert len(holders) == policy.engine.plan["layers"] == len(chosen.amax)
    assert policy.engine.precision == f"fp8-all (plan {chosen.digest}, data synthetic: 3)"
    assert policy.engine.plan["hash"] == chosen.digest
    assert policy.engine.plan["checkpoint_hash"] == policy.engine.checkpoint_hash == before.engine.checkpoint_hash
    json.dumps(policy.engine.to_json())
    a, b = (p.infer(requests[0]).actions_normalized for p in (policy, before))
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert 1e-4 < error < 0.1, error
    assert coverage.fallbacks(recorded.record(policy, lambda: policy.infer(requests[0]))) == []


def test_without_a_plan_nothing_changes(made):
    policy, _, _ = made
    assert policy.engine.plan is None
    assert policy.engine.precision == "bfloat16"
    assert policy.model.ops is not None
    assert not [m for m in policy.model.modules() if isinstance(m, Fp8Linear)]


def test_recording_leaves_the_policy_as_it_was(made):
    policy, requests, _ = made
    before, table = policy.infer(requests[0]).actions, policy.model.ops
    rows = recorded.record(policy, lambda: policy.infer(requests[0]))
    assert policy.model.ops is table
    assert np.array_equal(policy.infer(requests[0]).actions, before)
    assert {row.kernel for row in rows} == {"eager"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoint_hash": "0123456789abcdef"}, "belongs to another checkpoint; got a plan for weights 0123456789abcdef"),
        ({"checkpoint_hash": ""}, "got a plan for weights unknown"),
        ({"rules": (Rule("prefix.layer.*"),)}, "match no layer; got prefix.layer.*"),
        ({"rules": (Rule("*"),)}, "floating point only; got vision.patch"),
        ({"amax": {}}, "no activation range for"),
        ({"rules": (Rule("projector"),)}, "no activation range for 1 layers; got projector"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(checkpoint, made, tmp_path, change, said):
    path = written(tmp_path, replace(made[2], **change))
    with pytest.raises(ConfigError) as error:
        load(checkpoint, path)
    assert said in str(error.value)
    assert error.value.got is not None
    assert error.value.wanted is not None
    assert error.value.do


def test_ranges_of_layers_that_do_not_exist_are_refused(checkpoint, made, tmp_path):
    amax = {**made[2].amax, "prefix.layers.17.mlp.down": 3.0}
    with pytest.raises(ConfigError, match=r"this network lacks; got prefix\.layers\.17\.mlp\.down"):
        load(checkpoint, written(tmp_path, replace(made[2], amax=amax)))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), True])
def test_a_range_that_is_no_positive_number_is_refused(checkpoint, made, tmp_path, bad):
    first = next(iter(made[2].amax))
    path = written(tmp_path, replace(made[2], amax={**made[2].amax, first: bad}))
    with pytest.raises(ConfigError, match="not positive numbers"):
        load(checkpoint, path)


def test_an_unknown_format_is_refused(checkpoint, made, tmp_path):
    path = written(tmp_path, replace(made[2], rules=(Rule("prefix.layers.*", "e5m2"),)))
    with pytest.raises(ConfigError, match="'e5m2' in the rule for"):
        load(checkpoint, path)


def test_a_preset_says_how_to_make_a_plan_of_it(checkpoint):
    with pytest.raises(ConfigError, match="vivace calibrate CHECKPOINT --data RECORDED --preset fp8-mlp"):
        load(checkpoint, "fp8-mlp")
    with pytest.raises(ConfigError, match="wanted bfloat16"):
        load(checkpoint, "bf16")
    with pytest.raises(ConfigError, match="not a precision plan"):
        load(checkpoint, "no/such/plan.json")


def test_weights_that_changed_after_calibration_are_noticed(checkpoint, made, tmp_path):
    other = tmp_path / "other"
    make_checkpoint(other, Recipe(size="tiny", horizon=6, kind=checkpoint.name, seed=7))
    with pytest.raises(ConfigError, match="another checkpoint"):
        load(other, written(tmp_path, made[2]))


def test_on_a_gpu_that_cannot_run_it_a_plan_is_not_simulated_unasked(made, monkeypatch):
    monkeypatch.setattr(choice.base, "why_not", lambda name, **_: "the GPU is too old")
    config, device = EngineConfig(), torch.device("cuda")
    with pytest.raises(Unsupported, match="the GPU is too old"):
        choice.backend(config, device, made[0].model, quantised=True)


def test_what_auto_passes_over_is_told(made, monkeypatch, caplog):
    monkeypatch.setattr(choice.base, "why_not", lambda name, **_: f"{name} has a reason")
    chosen = choice.backend(EngineConfig(), torch.device("cuda"), made[0].model, quantised=False)
    assert chosen.name == "eager"
    assert chosen.facts == {
        "passed_over": {"cuda_graph": "cuda_graph has a reason", "compiled": "compiled has a reason"}
    }
    assert "cuda_graph is not used: cuda_graph has a reason" in caplog.text
    assert choice.backend(EngineConfig(), torch.device("cpu"), made[0].model, quantised=False).facts == {}


def test_a_warm_up_records_what_ran_and_a_server_tells_its_clients(checkpoint, made, tmp_path):
    policy = load(checkpoint, written(tmp_path, made[2]))
    assert policy.engine.coverage is None
    policy.warmup()
    said = policy.engine.coverage
    assert said["fallbacks"] == []
    assert said["flops_by_precision"]["e4m3"] > 0.01
    for of in ("flops", "bytes"):
        for by in ("kernel", "precision"):
            assert sum(said[f"{of}_by_{by}"].values()) == pytest.approx(1.0, abs=1e-3)
        assert sum(one[f"{of}_share"] for one in said["parts"]) == pytest.approx(1.0, abs=1e-3)
    assert said["bytes_by_precision"] != said["flops_by_precision"]
    down = next(one for one in said["parts"] if (one["part"], one["precision"]) == ("prefix mlp.down", "e4m3"))
    assert (down["kernel"], down["layers"] > 0, down["fallback"]) == ("eager", True, "")
    frame = unpack(metadata_frame({}, policy.engine))
    assert frame["vivace"]["coverage"] == said
    assert frame["vivace"]["plan"]["hash"] == made[2].digest
