"""The proof over poisoned memory, on graphs of a network whose weights lie in a private pool of their own."""

from dataclasses import replace

import pytest
import torch

from vivace.check import hopper_engines, hopper_proof, hopper_weights
from vivace.checkpoints.sizes import SIZES
from vivace.errors import NumericsError
from vivace.types import ModelInputs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["masks", "no masks"])
def served(request):
    """An engine in E4M3, as on a card that has it, else in bfloat16; a request and its noise. With masks: as served."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, config = torch.device("cuda"), SIZES["base"].model
    checkpoint = hopper_weights.random_checkpoint(config, seed=0, outliers=2)
    network = hopper_weights.load(checkpoint, device=device, precision="bfloat16")
    draws = torch.Generator(device).manual_seed(0)
    size = config.vision.image_size
    images = torch.randint(256, (1, 2, 3, size, size), dtype=torch.uint8, device=device, generator=draws)
    inputs = ModelInputs(images, torch.arange(2, 18, device=device)[None])
    noise = torch.randn(1, config.horizon, config.action_width, device=device, generator=draws)
    plan = None
    if torch.cuda.get_device_capability() >= (8, 9):
        ranges = hopper_engines.ranges_of(network, [(inputs, noise)])
        (plan,) = hopper_engines.plans_of(["fp8-all"], ranges, data="synthetic: a test")
    engine = hopper_engines.make(hopper_engines.OURS, network, plan=plan)
    if request.param == "masks":
        short = replace(inputs, tokens=inputs.tokens[:, :13].contiguous())  # three places of its bucket stay empty
        return engine, short, noise, "1x2 views + 16 tokens, masked"
    return engine, inputs, noise, "1x2 views + 16 tokens"


def _without(one, replay):
    """`replay` that leaves out the graph `one`."""
    return lambda captured: captured.result if captured is one else replay(captured)


def bits(model):
    """Copies of all tensors, as bytes: E4M3 has no equality in torch."""
    return {name: one.detach().flatten().view(torch.uint8).clone() for name, one in model.state_dict().items()}


def test_graphs_write_all_that_they_read(served):
    engine, inputs, noise, bucket = served
    row = hopper_proof.poisoned(engine, inputs, noise, chunking=hopper_proof.CHUNKING)
    assert row["passed"]
    assert engine.backend.describe()["buckets"] == [bucket]
    assert len(row["ways"]) == 5
    assert row["bytes"] > 0


def test_a_robots_graphs_are_among_those_that_are_poisoned(served, monkeypatch):
    """Pictures that are not looked at again: the cut graphs read what the poison left, the whole one does not."""
    engine, inputs, noise, _ = served
    hopper_proof.served(engine, inputs, noise)
    sight = engine.backend._slots.sight(1, 2, torch.uint8)
    monkeypatch.setattr(type(sight.vision), "replay", _without(sight.vision, type(sight.vision).replay))
    row = hopper_proof.poisoned(engine, inputs, noise)
    assert {name: way["same"] for name, way in row["ways"].items()} == {
        "infer": 3, "look, infer": 0, "prefill, denoise": 0,
    }  # fmt: skip


def test_results_of_all_graphs_can_be_spoilt_and_are_written_again(served):
    engine, inputs, noise, _ = served
    first = hopper_proof.served(engine, inputs, noise)
    assert torch.equal(engine.backend.infer(inputs, noise), first)
    results = engine.backend.graph_results()
    assert len(results) >= 3, "vision, what comes behind it, and the whole"
    for result in results:
        result.fill_(float("nan"))
    assert torch.equal(hopper_proof.served(engine, inputs, noise), first)
    assert torch.equal(engine.backend.infer(inputs, noise), first)


def test_poison_reaches_what_graphs_keep_and_no_weight(served):
    engine, inputs, *_ = served
    cache = engine.backend.prefill(inputs)
    weights = bits(engine.model)
    hopper_proof.poison_pool(engine.backend.graph_pool, engine.model.device)
    assert cache.k[0].isnan().all()
    assert all(torch.equal(one, weights[name]) for name, one in bits(engine.model).items())


def test_a_pool_without_memory_proves_nothing(served):
    with pytest.raises(NumericsError, match="nothing was poisoned"):
        hopper_proof.poison_pool((12345, 6), served[0].model.device)


def test_a_prompt_that_fills_its_bucket_runs_in_the_graphs_that_were_there(served):
    engine, inputs, noise, bucket = served
    full = replace(inputs, tokens=torch.arange(2, 18, device=inputs.tokens.device)[None])
    hopper_engines.as_served(engine, full, noise)
    engine.backend.infer(full, noise)
    assert engine.backend.describe()["buckets"][-1] == bucket, "with masks if those came first"
