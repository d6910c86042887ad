"""Engines without a GPU: every network for every target, at small and at full width, and what a build refuses."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from wanted import Subject

from vivace.backends import on_device
from vivace.backends.tensorrt import audit, module, networks, skeleton, targets
from vivace.backends.tensorrt import build as builder
from vivace.backends.tensorrt.build import Log, build, types_of
from vivace.backends.tensorrt.networks import PARTS, Shapes
from vivace.backends.tensorrt.symbols import Writer
from vivace.config import GemmaConfig, ModelConfig, VisionConfig
from vivace.errors import ConfigError, ShapeError, Unsupported
from vivace.model.pi import Pi
from vivace.precision.fit import all_layers
from vivace.precision.plan import preset

BOTH = targets.parse("sm89,sm120")
MIB = 2**20
SMALL = {
    "vision": VisionConfig(width=24, layers=1, mlp_width=40, num_heads=2, image_size=56),
    "prefix": GemmaConfig(width=32, layers=2, mlp_width=48, head_dim=16),
    "expert": GemmaConfig(width=16, layers=2, mlp_width=28, head_dim=16),
}


PLANS = ("bf16", "fp8-mlp", "fp8-full", "fp8-all")


def check_built(subject, parts, wanted=BOTH, *, largest=20 * MIB):
    """Every part is written, audited against the plan, and built."""
    for part in parts:
        network = subject.write(part)
        audit.check(network, subject.chosen.format_of)
        engine = build(network, wanted).engine
        assert 50_000 < len(engine) < largest, (part, len(engine))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_all_networks_build_for_both_targets(rtx, kind, plan):
    """FP16 and every kind of FP8 plan; vision, prefix, one step and the unrolled loop."""
    check_built(Subject(rtx, kind=kind, base="fp16", plan=plan, changes=SMALL), PARTS)


@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_all_networks_build_for_one_target(rtx, target):
    """What `vivace build` and a machine with one GPU ask for."""
    check_built(Subject(rtx, base="bf16", plan="fp8-all", changes=SMALL), PARTS, targets.parse(target))


@pytest.mark.parametrize(("kind", "plan", "base", "options"), [
    ("pi0", "fp8-full", "fp16", {"baked": True}), ("pi05", "bf16", "fp16", {"fused": True}),
    ("pi05", "fp8-all", "bf16", {"fused": True, "baked": True}), ("pi05", "bf16", "fp32", {}),
])  # fmt: skip
def test_other_ways_to_write_them_build(rtx, kind, plan, base, options):
    check_built(Subject(rtx, kind=kind, base=base, plan=plan, changes=SMALL, **options), PARTS[:3])


def test_every_target_of_rtx_in_one_engine(rtx):
    subject = Subject(rtx, base="bf16", changes=SMALL)
    every = targets.parse("sm80,sm86,sm89,sm120,sm121")
    assert build(subject.write("prefix"), every).engine


def test_a_flavour_that_keeps_vision_in_float32(rtx):
    """LeRobot's: its E4M3 layers read and give float32 then."""
    subject = Subject(rtx, base="bf16", plan="fp8-all", changes={**SMALL, "flavour": "lerobot"})
    network = subject.write("vision")
    found = audit.check(network, subject.chosen.format_of)
    assert {p.precision for p in found if p.is_attention} == {"float32"}
    assert subject.worst(network, wanted=subject.wanted("vision", simulated=True)) > 0.9999
    assert build(network, BOTH).engine


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return ModelConfig()


def outline(config: ModelConfig, plan: str) -> Pi:
    with torch.device("meta"):
        names = all_layers(Pi(config))
    return skeleton.outline(config, base="fp16", formats=preset(plan).formats(names))


def test_the_full_prefix_builds_in_seconds_without_weights(rtx, full):
    """18 layers of Gemma-2B, 968 tokens, MLPs in FP8: an engine of a few MB, and no gigabyte anywhere."""
    network = networks.write("prefix", outline(full, "fp8-mlp"), rtx, Shapes(keys=968))
    products = audit.check(network, preset("fp8-mlp").format_of)
    assert len(products) == 17 * 6 + 1
    assert sum(product.precision == "e4m3" for product in products) == 17 * 2
    seen = []
    built = build(network, BOTH, progress=lambda phase, done: seen.append((phase, done)))
    assert len(built.engine) < 16 * MIB
    assert built.seconds < 60.0
    assert seen
    assert all(0.0 <= done <= 1.0 for _, done in seen)


@pytest.mark.parametrize("part", ["vision", "step"])
def test_the_other_full_networks_build_too(rtx, full, part):
    """27 layers of SigLIP for three views, 18 layers of the expert over 968 keys, all linears in FP8."""
    shapes = Shapes(batch=3) if part == "vision" else Shapes(keys=968)
    network = networks.write(part, outline(full, "fp8-all"), rtx, shapes)
    count = {"vision": 27 * 6 + 2, "step": 18 * 6 + 2}[part]
    assert len(audit.check(network, preset("fp8-all").format_of)) == count
    built = build(network, BOTH)
    assert MIB < len(built.engine) < 16 * MIB
    assert built.seconds < 60.0


ONE_LAYER = ModelConfig(
    vision=VisionConfig(layers=1),
    prefix=GemmaConfig(layers=2),  # the last one is keys and values alone
    expert=GemmaConfig(width=1024, mlp_width=4096, layers=1),
)


@pytest.mark.parametrize("plan", [*PLANS, "int8-full"])
@pytest.mark.parametrize("part", ["vision", "prefix", "step"])
def test_one_layer_at_full_width_builds(rtx, plan, part):
    """At the sizes of (3 views, 200 prompt tokens, 50 actions): tiles and heads are those of the real network."""
    shapes = Shapes(batch=3) if part == "vision" else Shapes(keys=968)
    network = networks.write(part, outline(ONE_LAYER, plan), rtx, shapes)
    found = audit.check(network, preset(plan).format_of)
    eight = {product.precision for product in found} & {"e4m3", "int8"}
    assert bool(eight) == any(preset(plan).quantises(product.layer) for product in found)
    assert build(network, BOTH).engine


def test_baked_weights_are_in_the_engine(rtx):
    sizes = {}
    for baked in (False, True):
        subject = Subject(rtx, base="fp16", baked=baked, changes={"vocab_size": 64})
        sizes[baked] = len(build(subject.write("vision"), BOTH).engine)
    weights = sum(v.nbytes for k, v in subject.numbers.items() if k.startswith(("vision", "projector")))
    assert sizes[True] > sizes[False]
    assert sizes[True] - sizes[False] > 0.5 * weights


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "plan", "target", "says"), [
    ("fp16", "fp8-mlp", "sm86", "sm86 .RTX 30. has no FP8"),
    ("fp16", "fp8-mlp", "sm80,sm89", "sm80 .A100. has no FP8"),
    ("bf16", "bf16", "sm75", "sm75 .RTX 20. has no BF16.*fp16"),
    ("fp16", "bf16", "sm90", "no target sm90 .H100"),
    ("fp16", "bf16", "sm87", "no target sm87 .Jetson Orin.*--module tensorrt"),
    ("fp16", "bf16", "sm100", "no target sm100"),
    ("fp16", "bf16", "sm110", "no target sm110 .Jetson Thor"),
])  # fmt: skip
def test_a_target_that_cannot(rtx, base, plan, target, says):
    network = Subject(rtx, base=base, plan=plan).write("prefix")
    with pytest.raises(Unsupported, match=says):
        build(network, targets.parse(target))


def test_no_float32_products_on_turing(rtx):
    """The prefix alone has none; the patch layer and the action layers are float32 in openpi's flavour."""
    subject = Subject(rtx, base="fp16", changes=SMALL)
    assert build(subject.write("prefix"), targets.parse("sm75")).engine
    for part in ("vision", "step"):
        with pytest.raises(Unsupported, match=r"sm75 .RTX 20. has no float32 products"):
            build(subject.write(part), targets.parse("sm75,sm89"))


def test_a_plan_that_quantises_nothing_here_needs_no_fp8(rtx):
    """The vision tower of fp8-mlp is plain FP16: fine on an RTX 30, other than the prefix of the same policy."""
    subject = Subject(rtx, base="fp16", plan="fp8-mlp", changes=SMALL)
    vision = subject.write("vision")
    assert torch.float8_e4m3fn not in types_of(vision)
    assert torch.float8_e4m3fn in types_of(subject.write("prefix"))
    assert build(vision, targets.parse("sm86")).engine


@pytest.mark.parametrize("baked", [False, True])
def test_types_are_those_of_each_network(rtx, baked):
    subject = Subject(rtx, base="bf16", baked=baked, changes={**SMALL, "flavour": "lerobot"})
    found = {part: torch.bfloat16 in types_of(subject.write(part)) for part in ("vision", "prefix", "step")}
    assert found == {"vision": False, "prefix": True, "step": True}  # LeRobot's vision tower is float32 throughout


@pytest.mark.parametrize(("number", "base", "plan", "part", "says"), [
    (86, "fp16", "fp8-mlp", "prefix", "sm86 .RTX 30. has no FP8"),
    (75, "bf16", "bf16", "prefix", "sm75 .RTX 20. has no BF16"),
    (75, "fp16", "bf16", "step", "sm75 .RTX 20. has no float32 products"),
    (90, "fp16", "bf16", "prefix", "no target sm90"),
])  # fmt: skip
def test_the_gpu_of_this_machine_is_judged_like_a_named_one(rtx, monkeypatch, number, base, plan, part, says):
    asked = []
    monkeypatch.setattr(builder, "here", lambda device: asked.append(device) or targets.Target(number))
    with pytest.raises(Unsupported, match=says):
        build(Subject(rtx, base=base, plan=plan, changes=SMALL).write(part), (), device=torch.device("cuda:1"))
    assert asked == [torch.device("cuda:1")]


def test_the_gpu_that_was_asked_for_is_current_during_the_build(rtx, monkeypatch):
    network, current = Subject(rtx, base="fp16").write("prefix"), []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    class Watched(FakeBuilder):
        def build_serialized_network(self, definition, config):
            seen.extend(current)
            return b"plan"

    seen: list = []
    monkeypatch.setattr(builder, "on", on)
    monkeypatch.setattr(builder, "here", lambda device: targets.Target(89))
    network.owner.builder = Watched(network.owner.builder, network.owner.log, None)
    assert build(network, (), device=torch.device("cuda:1")).engine == b"plan"
    assert (seen, current) == ([torch.device("cuda:1")], [])


def test_only_a_gpu_is_made_current(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("current", device))
    assert on_device.on(torch.device("cuda:1")) == ("current", torch.device("cuda:1"))
    for none in (None, torch.device("cpu")):
        with on_device.on(none):
            pass


def test_a_refused_layer_quotes_tensorrt(rtx):
    said = ["Error Code 3: axis is out of range"]
    writer = Writer(rtx, None, None, said=said)
    with pytest.raises(ShapeError, match=r"refused the layer cast.*axis is out of range"):
        writer.wrap(None, torch.float32, "cast")
    said.clear()
    with pytest.raises(ShapeError, match="no reason given"):
        writer.wrap(None, torch.float32, "cast")


def test_a_network_gives_its_messages_to_its_writer(rtx, monkeypatch):
    class Refusing(networks.Writer):
        def input(self, name, dtype, shape):
            self.said.append("said by the builder")
            return self.wrap(None, dtype, name)

    monkeypatch.setattr(networks, "Writer", Refusing)
    with pytest.raises(ShapeError, match="said by the builder"):
        Subject(rtx, base="fp16").write("prefix")


def test_errors_and_no_warnings_are_kept(rtx):
    log = Log.of(rtx)
    severity = rtx.api.ILogger.Severity
    log.log(severity.WARNING, "slow")
    log.log(severity.ERROR, "wrong")
    assert log.messages == ["wrong"]


def test_advice_fits_both_ways_to_ask():
    text = targets.option("base", "fp16")
    assert text == "--base fp16 (serve, check, bench: --tensorrt base=fp16)"
    assert all(targets.option("base", "fp16") in advice for advice in targets.INSTEAD.values())


def test_this_machine_has_no_gpu(rtx):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    network = Subject(rtx, base="fp16").write("prefix")
    with pytest.raises(Unsupported, match=r"no CUDA device is visible.*--target sm89"):
        build(network, ())


@pytest.mark.parametrize("text", ["", "sm88", "rtx4090", "sm89,current"])
def test_unknown_targets(text):
    with pytest.raises(ConfigError, match="sm120"):
        targets.parse(text)


class FakeBuilder:
    """Fails as a builder without memory does: by None and a message, or by an exception."""

    def __init__(self, real, log, error):
        self._real, self._log, self._error = real, log, error

    def create_builder_config(self):
        return self._real.create_builder_config()

    def build_serialized_network(self, definition, config):
        if self._error is MemoryError:
            raise MemoryError
        self._log.messages.append(self._error)


@pytest.mark.parametrize(("error", "says"), [
    (MemoryError, "no memory left while building prefix.*--weights inputs"),
    ("Error Code 2: OutOfMemory (no further information)", "no memory left"),
    ("CUDA initialization failure: is the driver too old?", "cannot build for the GPU of this machine.*--target sm89"),
    ("Error Code 9: something else", "could not build prefix, 39 tokens for sm89, sm120; got Error Code 9"),
])  # fmt: skip
def test_what_a_builder_says_is_quoted(rtx, error, says):
    network = Subject(rtx, base="fp16").write("prefix")
    network.owner.builder = FakeBuilder(network.owner.builder, network.owner.log, error)
    with pytest.raises(Unsupported, match=says):
        build(network, BOTH)


# --- the module -------------------------------------------------------------------------------------------------------


class Fake:
    """An importable TensorRT."""

    def __init__(self, version):
        self.__version__ = version


def finder(**known):
    def find(name):
        if isinstance(known.get(name), str):
            return Fake(known[name])
        raise known.get(name) or ModuleNotFoundError(f"No module named '{name}'")

    return find


def test_the_module_is_chosen_by_name_or_by_what_is_there():
    both = finder(tensorrt="11.4.0.1", tensorrt_rtx="1.7.1.116")
    assert module.load(find=both).name == "tensorrt"
    assert module.load("tensorrt_rtx", find=both).label == "tensorrt_rtx 1.7.1.116"
    assert module.load(find=finder(tensorrt_rtx="1.7.1.116")).is_rtx


def test_without_a_module_the_error_names_the_extra():
    with pytest.raises(Unsupported, match=r"No module named 'tensorrt'.*vivace\[tensorrt\]"):
        module.load(find=finder())


def test_an_old_or_broken_module_is_named():
    with pytest.raises(Unsupported, match=r"tensorrt 10\.12\.1 is older than 10.13"):
        module.load("tensorrt", find=finder(tensorrt="10.12.1"))
    with pytest.raises(Unsupported, match="libnvinfer"):
        module.load("tensorrt", find=finder(tensorrt=OSError("libnvinfer.so.11: cannot open shared object file")))


def test_full_tensorrt_builds_where_it_runs(rtx):
    network = Subject(rtx, base="fp16").write("prefix")
    full = networks.Network(**{**vars(network), "module": module.Module("tensorrt", "11.4", rtx.api)})
    with pytest.raises(Unsupported, match=r"builds for the GPU it runs on only.*--target current"):
        build(full, BOTH)


def test_full_tensorrt_wants_scales_when_it_builds(rtx):
    subject = Subject(rtx, base="fp16", plan="fp8-mlp")
    full, shapes = module.Module("tensorrt", "10.13", rtx.api), Shapes(keys=39)
    with pytest.raises(ConfigError, match=r"needs prefix.layers.0.gate_up"):
        networks.write("prefix", subject.outlined, full, shapes)
    written = networks.write("prefix", subject.outlined, full, shapes, numbers=subject.numbers)
    stored = {name.rpartition(" #")[0] for name in written.constants}
    assert {name for name in subject.numbers if name.endswith("_scale")} <= stored
    assert "prefix.layers.0.gate_up.weight" not in stored
    audit.check(written, subject.chosen.format_of)


def test_fused_layers_only_where_the_module_has_them(rtx):
    class Older:
        INetworkDefinition = type("INetworkDefinition", (), {})

    subject = Subject(rtx, base="fp16")
    with pytest.raises(ConfigError, match="no fused attention"):
        networks.write(
            "prefix", subject.outlined, module.Module("tensorrt", "10.13", Older), Shapes(keys=39), fused=True
        )
