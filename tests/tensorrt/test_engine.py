"""Binding of torch tensors to an execution context, with a run time that only writes down what it is told."""

from __future__ import annotations

from enum import Enum

import pytest
import torch

from vivace.backends import base
from vivace.backends import tensorrt as backend
from vivace.backends.tensorrt import engine as running
from vivace.backends.tensorrt import module as modules
from vivace.backends.tensorrt import targets
from vivace.backends.tensorrt.build import build
from vivace.backends.tensorrt.engine import Engine
from vivace.config import EngineConfig, TensorRTConfig
from vivace.errors import NumericsError, ShapeError, Unsupported
from vivace.runtime import choice

CPU = torch.device("cpu")


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    FP8 = 2


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class Cache:
    def __init__(self):
        self.read = b""

    def deserialize(self, data):
        self.read = data

    def serialize(self):
        return b"compiled kernels"


class RuntimeConfig:
    def __init__(self):
        self.cache = None

    def create_runtime_cache(self):
        return Cache()

    def set_runtime_cache(self, cache):
        self.cache = cache


class Context:
    def __init__(self, config=None):
        self.config, self.addresses, self.runs, self.works = config, {}, [], True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        self.runs.append((stream, dict(self.addresses)))
        return self.works


class CudaEngine:
    TENSORS = (
        ("x", TensorIOMode.INPUT, (2, 3), DataType.FLOAT), ("w", TensorIOMode.INPUT, (3, 3), DataType.HALF),
        ("w8", TensorIOMode.INPUT, (3, 3), DataType.FP8), ("y", TensorIOMode.OUTPUT, (2, 3), DataType.HALF),
    )  # fmt: skip
    num_io_tensors = len(TENSORS)

    def __init__(self):
        self.context = None

    def _of(self, name):
        return next(row for row in self.TENSORS if row[0] == name)

    def get_tensor_name(self, index):
        return self.TENSORS[index][0]

    def get_tensor_mode(self, name):
        return self._of(name)[1]

    def get_tensor_shape(self, name):
        return self._of(name)[2]

    def get_tensor_dtype(self, name):
        return self._of(name)[3]

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, config=None):
        self.context = Context(config)
        return self.context


class Api:
    """Of an importable module, what an engine needs."""

    TensorIOMode = TensorIOMode
    made: CudaEngine

    class ILogger:
        class Severity:
            ERROR = 1

        def __init__(self):
            pass

    def Runtime(self, log):  # noqa: N802
        api = self

        class Runtime:
            def deserialize_cuda_engine(self, plan):
                api.log = log
                if plan == b"large":
                    log.log(1, "CUDA error 2 in createEngine: out of memory")
                    return None
                if plan != b"plan":
                    log.log(1, "The engine cannot run on this GPU, which has compute capability 9.0")
                    return None
                api.made = CudaEngine()
                return api.made

        return Runtime()


@pytest.fixture
def api():
    return Api()


def weights():
    return {
        "w": torch.ones(3, 3, dtype=torch.float16),
        "w8": torch.ones(3, 3).to(torch.float8_e4m3fn),
        "other": torch.ones(1),
    }


def test_addresses_are_bound_and_nothing_is_copied(api):
    stored, x = weights(), torch.zeros(2, 3)
    engine = Engine(modules.Module("tensorrt", "11.4", api), b"plan", weights=stored, device=CPU)
    context = api.made.context
    assert context.addresses == {name: stored[name].data_ptr() for name in ("w", "w8")}
    first, second = engine({"x": x}), engine({"x": x})
    assert first["y"].dtype == torch.float16
    assert first["y"].shape == (2, 3)
    assert [run[1]["x"] for run in context.runs] == [x.data_ptr()] * 2
    assert [run[1]["y"] for run in context.runs] == [first["y"].data_ptr(), second["y"].data_ptr()]
    assert first["y"].data_ptr() != second["y"].data_ptr(), "an answer must not be overwritten by the next"


@pytest.mark.parametrize(("feeds", "says"), [
    ({"x": torch.zeros(3, 2)}, "input x"),
    ({"x": torch.zeros(2, 3).double()}, "input x"),
    ({"x": torch.zeros(3, 2).T}, "strided"),
    ({"x": torch.zeros(2, 3, device="meta")}, "input x"),
    ({}, "not given"),
    ({"x": torch.zeros(2, 3), "z": torch.zeros(1)}, "no such input"),
])  # fmt: skip
def test_wrong_tensors_never_reach_the_engine(api, feeds, says):
    engine = Engine(modules.Module("tensorrt", "11.4", api), b"plan", weights=weights(), device=CPU)
    with pytest.raises(ShapeError, match=says):
        engine(feeds)
    assert api.made.context.runs == []


def test_a_refused_engine_quotes_the_reason(api):
    with pytest.raises(Unsupported, match=r"compute capability 9\.0"):
        Engine(modules.Module("tensorrt_rtx", "1.7", api), b"foreign", weights={}, device=CPU)


def test_a_failed_run_is_an_error(api):
    engine = Engine(modules.Module("tensorrt", "11.4", api), b"plan", weights=weights(), device=CPU)
    api.made.context.works = False
    with pytest.raises(NumericsError, match="did not run"):
        engine({"x": torch.zeros(2, 3)})


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("said", [["CUDA error 2: out of memory"], []])
def test_no_memory_for_a_context(api, monkeypatch, tmp_path, name, said):
    """TensorRT answers None then, on both ways to make one."""

    class Poor(CudaEngine):
        device_memory_size_v2 = 512 * 2**20

        def create_execution_context(self, config=None):
            for message in said:
                api.log.log(1, message)

    monkeypatch.setitem(globals(), "CudaEngine", Poor)
    with pytest.raises(
        running.NoMemory, match=rf"{name} 1 made no execution context.*512 MiB.*--weights inputs"
    ) as caught:
        Engine(modules.Module(name, "1", api), b"plan", weights=weights(), device=CPU, compiled=tmp_path / "x")
    assert (said or ["no reason given"])[0] in str(caught.value)


def test_no_memory_for_an_engine(api):
    with pytest.raises(running.NoMemory, match=r"no memory left for an engine of 0 MB.*out of memory"):
        Engine(modules.Module("tensorrt", "11", api), b"large", weights=weights(), device=CPU)
    with pytest.raises(Unsupported, match="capability") as caught:
        Engine(modules.Module("tensorrt", "11", api), b"foreign", weights=weights(), device=CPU)
    assert not isinstance(caught.value, running.NoMemory)


def test_what_rtx_compiled_is_kept(api, tmp_path):
    module, compiled = modules.Module("tensorrt_rtx", "1.7", api), tmp_path / "cache" / "sm89.runtime"
    Engine(module, b"plan", weights=weights(), device=CPU, compiled=compiled).save(compiled)
    assert api.made.context.config.cache.read == b""
    assert compiled.read_bytes() == b"compiled kernels"
    Engine(module, b"plan", weights=weights(), device=CPU, compiled=compiled)
    assert api.made.context.config.cache.read == b"compiled kernels"


def test_full_tensorrt_compiles_nothing_at_run_time(api, tmp_path):
    module = modules.Module("tensorrt", "11.4", api)
    Engine(module, b"plan", weights=weights(), device=CPU, compiled=tmp_path / "x").save(tmp_path / "x")
    assert api.made.context.config is None
    assert not (tmp_path / "x").exists()


class Nothing(CudaEngine):
    """An engine without inputs and outputs: no memory of a GPU is needed."""

    TENSORS = ()
    num_io_tensors = 0


def test_its_gpu_is_current_when_an_engine_is_made_and_run(api, monkeypatch, devices):
    on, current, seen = *devices, []

    class Watched(Nothing):
        def create_execution_context(self, config=None):
            seen.append(("made", *current))
            context = super().create_execution_context(config)
            context.execute_async_v3 = lambda stream: seen.append(("run", *current)) or True
            return context

    monkeypatch.setattr(running, "on", on)
    monkeypatch.setattr(running.Engine, "_stream", lambda self: 0)
    monkeypatch.setitem(globals(), "CudaEngine", Watched)
    gpu = torch.device("cuda:1")
    assert Engine(modules.Module("tensorrt", "11.4", api), b"plan", weights={}, device=gpu)({}) == {}
    assert seen == [("made", gpu), ("run", gpu)]


USED = {
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": [
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype",
        "create_execution_context", "create_runtime_config", "device_memory_size_v2",
    ],
    "IRuntimeConfig": ["create_runtime_cache", "set_runtime_cache"],
    "IRuntimeCache": ["serialize", "deserialize"],
    "IExecutionContext": ["set_tensor_address", "execute_async_v3"],
    "TensorIOMode": ["INPUT", "OUTPUT"],
}  # fmt: skip


@pytest.mark.parametrize("kind", USED)
def test_the_real_run_time_has_every_name_that_the_fake_has(rtx, kind):
    real = getattr(rtx.api, kind)
    assert [name for name in USED[kind] if getattr(real, name, None) is None] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_real_run_time_without_a_driver(rtx):
    """A real engine, a real refusal, in TensorRT's own words."""
    from wanted import Subject

    subject = Subject(rtx, base="fp16")
    plan = build(subject.write("vision"), targets.parse("sm89")).engine
    with pytest.raises(Unsupported, match=r"tensorrt_rtx 1\..* refuses the engine; got .*(driver|CUDA)"):
        Engine(rtx, plan, weights=subject.numbers, device=CPU)


# --- why not ----------------------------------------------------------------------------------------------------------


def test_why_not_on_a_cpu(rtx):
    assert "need an NVIDIA GPU, not cpu" in base.why_not("tensorrt", device="cpu")


def test_why_not_without_a_module(monkeypatch):
    def missing(wanted="auto"):
        raise Unsupported("no usable TensorRT is installed", do="pip install 'vivace[tensorrt]'")

    monkeypatch.setattr(modules, "load", missing)
    assert "vivace[tensorrt]" in base.why_not("tensorrt", device="cuda")


def test_why_not_looks_at_the_module_that_was_asked_for(monkeypatch):
    """Full TensorRT is installed and wanted by default; the person asked for RTX, which refuses Hopper."""
    asked = []

    def load(wanted="auto"):
        asked.append(wanted)
        raise Unsupported(f"{wanted} is not installed")

    monkeypatch.setattr(modules, "load", load)
    config = EngineConfig(backend="tensorrt", tensorrt=TensorRTConfig(module="tensorrt_rtx"))
    assert "tensorrt_rtx is not installed" in base.why_not("tensorrt", device="cuda", config=config)
    with pytest.raises(Unsupported, match="tensorrt_rtx is not installed"):
        choice.refuse_early(config, CPU)
    base.why_not("tensorrt", device="cuda")
    assert asked == ["tensorrt_rtx", "tensorrt_rtx", "auto"]


def test_hopper_is_refused_by_rtx_and_not_by_full_tensorrt(rtx):
    hopper = targets.Target(90)
    assert "no target sm90 (H100, H200)" in backend.refused_gpu(rtx, hopper)
    assert backend.refused_gpu(modules.Module("tensorrt", "11.4", rtx.api), hopper) is None
    assert backend.refused_gpu(rtx, targets.Target(120)) is None


def test_a_plan_on_a_gpu_without_fp8(rtx, monkeypatch):
    from wanted import Subject

    monkeypatch.setattr(backend, "here", lambda device: targets.Target(87))
    subject = Subject(rtx, plan="fp8-mlp")
    assert "sm87 (Jetson Orin) has no FP8" in backend.why_not_model(subject.quantised)
    assert backend.why_not_model(subject.model) is None
    monkeypatch.setattr(backend, "here", lambda device: targets.Target(89))
    assert backend.why_not_model(subject.quantised) is None
