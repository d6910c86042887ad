"""Out of memory: one clear error that says where, how much and what to do; never a slower path."""

import numpy as np
import pytest
import torch

from vivace.errors import Unsupported
from vivace.runtime import gpu_memory

CPU = torch.device("cpu")
TORCHS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free."
)


def test_the_error_says_what_got_wanted_and_do():
    with pytest.raises(Unsupported) as caught, gpu_memory.explained("loading the weights", device=CPU):
        raise torch.OutOfMemoryError(TORCHS)
    error = caught.value
    assert error.got == "Tried to allocate 2.00 GiB"
    assert error.what == "the memory of cpu does not suffice for loading the weights"
    assert "weights of the plan" in error.wanted
    assert "FP8 plan" in error.do
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert "Tried to allocate" in str(error.__cause__)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="illegal"), gpu_memory.explained("an inference", device=CPU):
        raise RuntimeError("illegal memory access")


def test_a_policy_that_runs_out_says_so(policy_and_request, monkeypatch):
    policy, request = policy_and_request

    def full(*_, **__):
        raise torch.OutOfMemoryError(TORCHS)

    monkeypatch.setattr(policy.backend, "infer", full)
    with pytest.raises(Unsupported, match="does not suffice for an inference"):
        policy.infer(request)


@pytest.fixture
def policy_and_request():
    from vivace.check import hopper_engines, hopper_robot, hopper_weights
    from vivace.check.targets import Size
    from vivace.checkpoints.sizes import SIZES

    config, size = SIZES["tiny"].model, Size(1, 48, 5)
    checkpoint = hopper_weights.random_checkpoint(config, seed=0, outliers=0)
    network = hopper_weights.load(checkpoint, device=CPU, precision="float32")
    engine = hopper_engines.make("cuda_graph", network)
    pipe = hopper_robot.pipeline(size, config, hopper_robot.toy_tokenizer(config.vocab_size))
    scenes = hopper_robot.Scenes.make(1, views=1, image_size=224, seed=0)
    policy = hopper_engines.policy_of(engine, size, pipe, checkpoint)
    request = hopper_robot.request(pipe, size, scenes, 0)
    assert np.isfinite(policy.infer(request).actions).all()
    return policy, request


@pytest.mark.gpu
def test_a_full_gpu_is_explained():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    total = torch.cuda.mem_get_info(device)[1]
    with pytest.raises(Unsupported, match="GB free of") as caught, gpu_memory.explained("this test", device=device):
        torch.empty(2 * total, dtype=torch.uint8, device=device)
    assert "Tried to allocate" in caught.value.got
    assert float(torch.ones(4, device=device).sum()) == 4.0, "the device works on"
