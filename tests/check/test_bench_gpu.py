"""CUDA events against work whose duration on the device is known."""

import time

import pytest
import torch

from vivace.check import bench
from vivace.check.environment import collect
from vivace.check.gpus import match_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_device_time_is_the_devices_and_host_time_includes_it():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def products():
        for _ in range(20):
            x @ x

    times = bench.measure({"products": products}, samples=20, device=bench.CudaTimer())["products"]
    device, host = bench.summary(times.device_ms), bench.summary(times.total_ms)
    assert 0 < device.p50_ms <= host.p50_ms * 1.02


def test_sleep_on_the_host_is_no_device_work():
    x = torch.zeros(8, device="cuda")

    def idle():
        x.add_(1)
        torch.cuda.synchronize()
        time.sleep(0.02)

    times = bench.measure({"idle": idle}, samples=10, warmup=bench.WarmUp(max_calls=2))["idle"]
    assert bench.summary(times.total_ms).p50_ms >= 20


def test_the_launch_is_hidden_behind_the_spin():
    """The spin is over only after the launch: the timer counts no late launch, and without a spin it counts none at all."""
    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(200):
            x.add_(1)
    plain, spinning = bench.CudaTimer(), bench.CudaTimer(spin_ms=bench.SPIN_MS)
    for timer in (plain, spinning):
        bench.measure({"g": graph.replay}, samples=200, device=timer)
    assert plain.calls >= 200
    assert plain.exposed == 0
    assert spinning.calls >= 200
    assert spinning.exposed <= spinning.calls // 50


def test_a_launch_that_outlasts_the_spin_is_counted():
    timer = bench.CudaTimer(spin_ms=0.01)
    bench.measure({"late": lambda: time.sleep(0.005)}, samples=10, warmup=bench.WarmUp(max_calls=2), device=timer)
    assert timer.exposed == timer.calls >= 10


def test_environment_names_the_gpu():
    gpu = collect()["gpus"][0]
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["driver"]
    assert match_gpu(gpu["name"]) is None or match_gpu(gpu["name"]).label.split()[0] in gpu["name"]
