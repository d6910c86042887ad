"""What every backend must do, as checks that take a way to build one. Also run against backends that are broken on purpose.

A backend is compared with the literal formula (tests/model/literal.py), not with another backend; of a quantised network
the formula does not know the formats, so there the truth is the network's own operations with the same codes and scales,
everything else in float32. Each check is a function (subject) -> None that raises AssertionError; `CHECKS` is the suite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from literal import Case, Literal
from tiny import build, random_tensors, tiny_config
from torch import Tensor

from vivace.backends import eager
from vivace.backends.base import Backend
from vivace.backends.spans import Spans
from vivace.config import EngineConfig, ModelConfig
from vivace.model import flow
from vivace.model.pi import Pi
from vivace.precision import calibrate, quantize
from vivace.precision.plan import PrecisionPlan, preset
from vivace.types import ModelInputs, PreviousChunk, Trace

STEPS = 4
UNEVEN = (1.0, 0.4, 0.7, 0.5)


class Formula:
    """The truth about a network: the literal formula in float32."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
        self.config, self.literal = config, Literal(config, tensors)

    def sample(self, case: Case, clamp=None) -> tuple[Tensor, list[Tensor]]:
        """Actions, and the velocity of every step."""
        actions, velocities, *_ = self.literal.sample(case, flow.time_grid(STEPS, self.config.time_grid), clamp=clamp)
        return actions, velocities

    def prefix(self, case: Case) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Of one observation: vision tokens, prefix embeddings, and (K, V) of every layer, [1, S, ...]."""
        views, embeds, mask, past = self.literal.prefix(case)
        S = int(mask.sum())
        return views, embeds, [(k[:, :S], v[:, :S]) for k, v in past]


class OwnOperations:
    """The truth about a quantised network: its operations one by one, its codes and scales are those under test."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], plan: PrecisionPlan) -> None:
        model = build(config, tensors)
        quantize.apply(model, plan)
        self.backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))

    def sample(self, case: Case, clamp=None) -> tuple[Tensor, list[Tensor]]:
        """See Formula."""
        previous, trace = None if clamp is None else PreviousChunk(*clamp, "trained"), Trace()
        cache = self.backend.prefill(inputs_of(case, masks=True))
        return self.backend.denoise(cache, case.noise, previous=previous, trace=trace), trace.velocity

    def prefix(self, case: Case) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """See Formula."""
        trace = Trace()
        cache = self.backend.prefill(inputs_of(case), trace=trace)
        S = trace.prefix_embeds.shape[1]
        past = [(k[:, :S], v[:, :S]) for k, v in zip(cache.k, cache.v, strict=True)]
        return trace.vision_tokens, trace.prefix_embeds, past


def measured_plan(config: ModelConfig, tensors: dict[str, Tensor], name: str) -> PrecisionPlan:
    """A preset with the ranges of the float32 network over a few observations; "NAME+scale:row" has such input scales."""
    model = build(config, tensors)
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))
    with calibrate.watch(model) as ranges:
        for seed in range(4):
            case = case_of(config, tokens=6 + seed, seed=seed)
            ranges.begin_prefill()
            cache = backend.prefill(inputs_of(case))
            ranges.begin_denoise()
            backend.denoise(cache, case.noise)
    chosen, _, scale = name.partition("+scale:")
    plan = preset(chosen).with_input_scale(scale) if scale else preset(chosen)
    made = calibrate.with_ranges(plan, ranges, data="synthetic: conformance")
    # ranges of random networks hardly differ between steps, and another step's scale would not be noticed
    apart = {name: tuple(one * UNEVEN[i] for i, one in enumerate(steps)) for name, steps in made.step_amax.items()}
    return replace(made, step_amax=apart)


@dataclass
class Subject:
    """A backend under test, the network it runs, and how exact it must be (relative L2 against the truth).

    preset  of the layers that run in 8 bits, in the network of the truth too; see `measured_plan`
    """

    create: Callable[[Pi, EngineConfig], Backend]
    kind: str
    tolerance: float = 1e-5
    device: str = "cpu"
    dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32
    config_changes: dict = field(default_factory=dict)
    preset: str = "bf16"

    def __post_init__(self) -> None:
        self.config: ModelConfig = tiny_config(self.kind, **self.config_changes)
        tensors = random_tensors(self.config)  # rounded as the network holds them: the formula judges arithmetic alone
        self.tensors = {name: value.to(self.dtype_of(name)).float() for name, value in tensors.items()}
        self.model = build(self.config, self.tensors, dtype_of=self.dtype_of, device=self.device)
        self.truth: Formula | OwnOperations = Formula(self.config, self.tensors)
        if self.preset != "bf16":
            plan = measured_plan(self.config, self.tensors, self.preset)
            self.truth = OwnOperations(self.config, self.tensors, plan)
            quantize.apply(self.model, plan)
        self.backend = self.create(self.model, EngineConfig(num_denoise_steps=STEPS))

    def run(self, inputs: ModelInputs, noise: Tensor, previous: PreviousChunk | None = None, trace=None) -> Tensor:
        on = lambda t: None if t is None else t.to(self.device)  # noqa: E731
        moved = ModelInputs(*(on(getattr(inputs, f)) for f in inputs.__dataclass_fields__))
        cache = self.backend.prefill(moved, trace=trace)
        return self.backend.denoise(cache, noise.to(self.device), previous=previous, trace=trace).float().cpu()

    def close(self, got: Tensor, wanted: Tensor, what: str) -> None:
        assert torch.isfinite(got).all(), f"{what}: not finite"
        error = float((got - wanted).norm() / wanted.norm())
        assert error <= self.tolerance, f"{what}: relative error {error:.2e} > {self.tolerance:.0e}"


def case_of(config: ModelConfig, *, tokens: int = 6, views: int = 2, batch: int = 1, seed: int = 1) -> Case:
    g = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    return Case(
        images=torch.rand(batch, views, 3, size, size, generator=g) * 2 - 1,
        view_mask=torch.ones(batch, views, dtype=torch.bool),
        tokens=torch.randint(0, config.vocab_size, (batch, tokens), generator=g),
        token_mask=torch.ones(batch, tokens, dtype=torch.bool),
        state=torch.randn(batch, 32, generator=g),
        noise=torch.randn(batch, config.horizon, 32, generator=g),
    )


def inputs_of(case: Case, *, masks: bool = False) -> ModelInputs:
    return ModelInputs(
        case.images, case.tokens, case.view_mask if masks else None, case.token_mask if masks else None, case.state
    )


def wanted(subject: Subject, case: Case, clamp=None) -> Tensor:
    return subject.truth.sample(case, clamp)[0]


def on_device(subject: Subject, inputs: ModelInputs) -> ModelInputs:
    return ModelInputs(*(None if t is None else t.to(subject.device) for t in vars(inputs).values()))


def check_agrees_with_the_literal_formula(subject: Subject) -> None:
    for views, tokens in ((2, 6), (1, 1), (3, 17)):
        case = case_of(subject.config, views=views, tokens=tokens)
        got = subject.run(inputs_of(case), case.noise)
        subject.close(got, wanted(subject, case), f"{views} views, {tokens} tokens")


def check_prompt_length_may_change_every_frame(subject: Subject) -> None:
    """Lengths inside and across buckets, back and forth: a stale mask or position shows here."""
    for tokens in (6, 7, 5, 16, 17, 6):
        case = case_of(subject.config, tokens=tokens, seed=tokens)
        subject.close(subject.run(inputs_of(case), case.noise), wanted(subject, case), f"{tokens} tokens")


def check_masks(subject: Subject) -> None:
    """Padded prompts and missing views in a batch of two."""
    case = case_of(subject.config, batch=2, tokens=9, views=3)
    case.token_mask[0, 4:] = False
    case.view_mask[1, 1] = False
    subject.close(subject.run(inputs_of(case, masks=True), case.noise), wanted(subject, case), "masked batch")


def check_fresh(subject: Subject) -> None:
    """Change image, prompt, state or noise: the actions must change, and come back when the change is taken back."""
    case = case_of(subject.config)
    first = subject.run(inputs_of(case), case.noise)
    changes = {"images": case.images.flip(-1), "tokens": (case.tokens + 1) % subject.config.vocab_size}
    if subject.kind == "pi0":
        changes["state"] = case.state + 1.0
    for name, value in changes.items():
        other = Case(**{**case.__dict__, name: value})
        changed = subject.run(inputs_of(other), case.noise)
        assert float((changed - first).abs().max()) > 1e-4, f"the actions did not react to new {name}"
        subject.close(changed, wanted(subject, other), f"after new {name}")
    assert torch.equal(subject.run(inputs_of(case), case.noise), first), "the first answer did not come back"


def check_two_caches_do_not_mix(subject: Subject) -> None:
    """The cache belongs to its observation: denoising twice from one cache gives one answer per noise."""
    case, other = case_of(subject.config, seed=1), case_of(subject.config, seed=2)
    subject.run(inputs_of(other), other.noise)
    subject.close(
        subject.run(inputs_of(case), other.noise),
        wanted(subject, Case(**{**case.__dict__, "noise": other.noise})),
        "noise",
    )


def check_repeats_to_the_bit(subject: Subject) -> None:
    case = case_of(subject.config)
    answers = [subject.run(inputs_of(case), case.noise) for _ in range(5)]
    assert all(torch.equal(answers[0], answer) for answer in answers[1:]), "not bit-identical on repetition"


def check_committed_actions(subject: Subject) -> None:
    """Trained real-time chunking: clamped and conditioned per token."""
    case = case_of(subject.config)
    older = torch.randn(case.noise.shape, generator=torch.Generator().manual_seed(7))
    for delay in (3, 1):
        got = subject.run(inputs_of(case), case.noise, PreviousChunk(older.to(subject.device), delay, "trained"))
        assert torch.equal(got[:, :delay], older[:, :delay]), "committed actions were moved"
        subject.close(got, wanted(subject, case, clamp=(older, delay)), f"committed {delay}")


def check_infer_is_both_stages(subject: Subject) -> None:
    """What a robot calls gives the bits of what evidence is taken from, with and without an older chunk."""
    older = torch.randn(1, subject.config.horizon, 32, generator=torch.Generator().manual_seed(7)).to(subject.device)
    for seed in (1, 2):
        case = case_of(subject.config, seed=seed)
        moved = on_device(subject, inputs_of(case))
        noise = case.noise.to(subject.device)
        for previous in (None, PreviousChunk(older, 2, "trained")):
            both = subject.backend.denoise(subject.backend.prefill(moved), noise, previous=previous).clone()
            got = subject.backend.infer(moved, noise, previous=previous)
            assert torch.equal(got, both), f"infer differs, previous {previous is not None}"


def check_look_changes_no_bit(subject: Subject) -> None:
    """Pictures first, the rest later; pictures of a request that never comes; and pictures that something came between."""
    older = torch.randn(1, subject.config.horizon, 32, generator=torch.Generator().manual_seed(7)).to(subject.device)
    (one, noise), (other, _) = (
        (on_device(subject, inputs_of(case)), case.noise.to(subject.device))
        for case in (case_of(subject.config, seed=1), case_of(subject.config, seed=2))
    )
    backend = subject.backend
    for previous in (None, PreviousChunk(older, 2, "trained")):
        wanted = [backend.infer(inputs, noise, previous=previous) for inputs in (one, other)]
        for inputs, answer in zip((one, other), wanted, strict=True):
            backend.look(inputs.images)
            assert torch.equal(backend.infer(inputs, noise, previous=previous), answer), "look changes the answer"
        backend.look(other.images)
        assert torch.equal(backend.infer(one, noise, previous=previous), wanted[0]), "the pictures of another request"
        backend.look(one.images)
        backend.prefill(other)
        assert torch.equal(backend.infer(one, noise, previous=previous), wanted[0]), "a prefill after the look"
        backend.look(one.images)
        backend.infer(other, noise, previous=previous)
        assert torch.equal(backend.infer(one, noise, previous=previous), wanted[0]), "another request after the look"


def check_trace_tells_the_truth(subject: Subject) -> None:
    case, trace = case_of(subject.config), Trace()
    got = subject.run(inputs_of(case), case.noise, trace=trace)
    assert len(trace.x) == STEPS + 1, f"x has {len(trace.x)} entries"
    assert len(trace.velocity) == STEPS, f"velocity has {len(trace.velocity)} entries"
    assert torch.equal(trace.x[-1].float().cpu(), got), "the last x is not the answer"
    _, velocities = subject.truth.sample(case)
    subject.close(trace.velocity[0].float().cpu(), velocities[0], "first velocity")
    assert trace.vision_tokens is not None, "no vision tokens"
    assert trace.prefix_embeds is not None, "no prefix embeds"
    views, embeds, _ = subject.truth.prefix(case)
    subject.close(trace.vision_tokens.float().cpu(), views, "vision tokens")
    subject.close(trace.prefix_embeds.float().cpu(), embeds, "prefix embeds")


def check_cache_holds_keys_and_values(subject: Subject) -> None:
    case = case_of(subject.config)
    moved = on_device(subject, inputs_of(case))
    cache = subject.backend.prefill(moved)
    _, embeds, past = subject.truth.prefix(case)
    S = embeds.shape[1]
    assert int(cache.length[0]) == S + (subject.kind == "pi0"), f"length {int(cache.length[0])}"
    for layer, (k, v) in enumerate(past):
        subject.close(cache.k[layer][:, :S].float().cpu(), k, f"K of layer {layer}")
        subject.close(cache.v[layer][:, :S].float().cpu(), v, f"V of layer {layer}")


def check_spans_are_named(subject: Subject) -> None:
    case, spans = case_of(subject.config), Spans(cuda=subject.device.startswith("cuda"))
    moved = on_device(subject, inputs_of(case))
    cache = subject.backend.prefill(moved, spans=spans)
    subject.backend.denoise(cache, case.noise.to(subject.device), spans=spans)
    at_once = Spans(cuda=subject.device.startswith("cuda"))
    subject.backend.infer(moved, case.noise.to(subject.device), spans=at_once)
    looked = Spans(cuda=subject.device.startswith("cuda"))
    subject.backend.look(moved.images)
    subject.backend.infer(moved, case.noise.to(subject.device), spans=looked)
    for seen in (spans.milliseconds(), at_once.milliseconds(), looked.milliseconds()):
        assert {"vision", "prefix", "denoise"} <= set(seen), f"spans {sorted(seen)}"


CHECKS: dict[str, Callable[[Subject], None]] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}
