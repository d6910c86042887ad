"""The parity test must fail for every engine that is wrong: that is what it is for."""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch

from vivace.backends import eager
from vivace.check import parity
from vivace.config import EngineConfig, ResolvedEngine
from vivace.errors import ShapeError
from vivace.precision.flavours import parameter_dtype
from vivace.types import ModelInputs

CONFIG = EngineConfig(num_denoise_steps=4)


def engine(kind="pi05", *, precision="float32", scale=None, steps=4):
    config = tiny.tiny_config(kind)
    tensors = tiny.random_tensors(config)
    for name, factor in (scale or {}).items():
        tensors[name] = tensors[name] * factor
    flavour = config.flavour
    model = tiny.build(
        config, tensors, dtype_of=lambda name: parameter_dtype(name, precision=precision, flavour=flavour)
    )
    return eager.create(model, EngineConfig(num_denoise_steps=steps))


def inputs(seed=0, *, padded=False, kind="pi05"):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 64, (2, 6), generator=g)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]) if padded else None
    images = torch.rand((2, 2, 3, 56, 56), generator=g) * 2 - 1
    state = torch.randn((2, 32), generator=g) if kind == "pi0" else None
    return ModelInputs(images=images, tokens=tokens, token_mask=mask, state=state)


def noise(seed=1):
    return torch.randn((2, 7, 32), generator=torch.Generator().manual_seed(seed))


def failed(rows, precision="float32"):
    summary = parity.summarise(rows)
    marks = parity.judge(summary, parity.marks_for(precision), vision_layers=2, layers=3)
    return {mark.what for mark in marks if not mark.passed}


def failed_two_error(candidate, pairs):
    """Marks of the two-error rule that a bfloat16 candidate misses; the yardstick is eager bfloat16 on the same pairs."""

    def summary_of(one):
        return parity.summarise([parity.compare(engine(), one, *pair) for pair in pairs])

    marks = parity.judge_against_plain(summary_of(candidate), summary_of(engine(precision="bfloat16")), name="bfloat16")
    return {mark.what.removesuffix(" against plain bfloat16") for mark in marks if not mark.passed}


def all_valid(inner, cache, noise, trace):
    """Attends to padding in the denoise loop: two tokens of 38."""
    return inner.denoise(dataclasses.replace(cache, mask=torch.ones_like(cache.mask)), noise, trace=trace)


def padding_attended(inner, given, trace):
    """Attends to padding in the prefix."""
    right = inner.prefill(given, trace=trace)
    wrong = inner.prefill(dataclasses.replace(given, token_mask=None))
    return dataclasses.replace(wrong, mask=right.mask, length=right.length)


def first_for_ever():
    """A cache that is never computed again."""
    kept = []

    def prefill(inner, given, trace):
        kept.append(inner.prefill(given, trace=trace))
        return kept[0]

    return prefill


class Wrong:
    """An engine with one deliberate mistake around a right one."""

    name = "wrong"

    def __init__(self, inner, *, prefill=None, denoise=None):
        self.inner, self._prefill, self._denoise = inner, prefill, denoise

    def prefill(self, inputs, *, trace=None, spans=None):
        if self._prefill:
            return self._prefill(self.inner, inputs, trace)
        return self.inner.prefill(inputs, trace=trace)

    def denoise(self, cache, noise, *, previous=None, trace=None, spans=None):
        if self._denoise:
            return self._denoise(self.inner, cache, noise, trace)
        return self.inner.denoise(cache, noise, trace=trace)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_engine_equals_itself(kind, padded):
    row = parity.compare(engine(kind), engine(kind), inputs(kind=kind, padded=padded), noise())
    assert failed([row]) == set()
    assert row.actions.sqnr_db == math.inf
    assert len(row.k) == len(row.v) == 3
    assert len(row.velocity) == 4
    assert len(row.x) == 5
    assert row.vision is not None
    assert row.embeds is not None


def test_marks_tell_float32_from_bfloat16():
    rows = [parity.compare(engine(), engine(precision="bfloat16"), inputs(seed), noise(seed)) for seed in range(3)]
    assert failed(rows, "bfloat16") == set()
    strict = failed(rows, "float32")
    assert {"K layer 2, relative L2", "velocity step 0, relative L2", "actions, relative L2"} <= strict


def test_padding_does_not_count():
    """The cache of the padded row holds garbage behind the mask; what is compared is what is read."""
    snapshot = parity.run_traced(engine(), inputs(padded=True), noise())
    valid = 2 * (2 * 16) + 6 + 4
    assert snapshot.k[0].shape[0] == valid
    assert snapshot.embeds.shape[0] == valid

    def garbage(inner, given, trace):
        cache = inner.prefill(given, trace=trace)
        for tensor in (*cache.k, *cache.v):
            tensor[~cache.mask] = 7.0
        return cache

    row = parity.compare(engine(), Wrong(engine(), prefill=garbage), inputs(padded=True), noise())
    assert failed([row]) == set()


def test_a_wrong_mask_fails():
    row = parity.compare(engine(), Wrong(engine(), denoise=all_valid), inputs(padded=True), noise())
    found = failed([row])
    assert "velocity step 0, relative L2" in found
    assert not any(what.startswith(("K", "V")) for what in found), "the first bad stage is the denoise step"

    row = parity.compare(engine(), Wrong(engine(), prefill=padding_attended), inputs(padded=True), noise())
    assert "K layer 1, relative L2" in failed([row])


MISTAKES = {
    "mask in denoise": lambda right: Wrong(right, denoise=all_valid),
    "mask in prefix": lambda right: Wrong(right, prefill=padding_attended),
    "stale cache": lambda right: Wrong(right, prefill=first_for_ever()),
    "scale of the text": lambda right: engine(precision="bfloat16", scale={"embedding.weight": 32**-0.5}),
}
FIRST_WRONG = {
    "mask in denoise": {"velocity step 2, relative L2", "actions, relative L2"},
    "mask in prefix": {"K layer 1, relative L2", "V layer 1, relative L2"},
    "stale cache": {"K layer 0, relative L2", "V layer 0, relative L2"},
    "scale of the text": {"prefix embeddings, relative L2"},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mistake_hides_in_bfloat16(mistake):
    """The two-error rule sees each of them, also those that the marks of bfloat16 alone let pass."""
    pairs = [(inputs(seed, padded=True), noise(seed + 1)) for seed in range(3)]
    found = failed_two_error(MISTAKES[mistake](engine(precision="bfloat16")), pairs)
    assert FIRST_WRONG[mistake] <= found
    if mistake == "mask in denoise":
        assert not any(what.startswith(("K", "V")) for what in found), "the first bad stage is the denoise step"
        rows = [
            parity.compare(engine(), Wrong(engine(precision="bfloat16"), denoise=all_valid), *pair) for pair in pairs
        ]
        assert failed(rows, "bfloat16") == set(), "the absolute marks alone cannot see it"


@pytest.mark.parametrize("seed", range(6))
def test_another_order_of_the_same_arithmetic_passes_in_bfloat16(seed):
    """The same prompts with four padding tokens more: other shapes, other sums, the same policy."""
    given = inputs(seed)
    longer = dataclasses.replace(
        given,
        tokens=torch.nn.functional.pad(given.tokens, (0, 4)),
        token_mask=torch.tensor([[True] * 6 + [False] * 4] * 2),
    )

    def pad_first(inner, given, trace):
        return inner.prefill(longer, trace=trace)

    assert failed_two_error(Wrong(engine(precision="bfloat16"), prefill=pad_first), [(given, noise(seed))]) == set()


@pytest.mark.parametrize(
    ("backend", "precision", "wanted"),
    [("compiled", "bfloat16", True), ("eager", "bfloat16", False), ("compiled", "float32", False)],
)
def test_who_needs_a_yardstick(backend, precision, wanted):
    resolved = ResolvedEngine(
        backend=backend, device="cpu", precision=precision, num_denoise_steps=4, seed=0, checkpoint="x",
        policy_kind="pi05", horizon=7, action_dim=32, flavour="openpi_torch", version="0",
    )  # fmt: skip
    assert parity.needs_yardstick(resolved) is wanted


def test_a_stale_cache_fails():
    stale = Wrong(engine(), prefill=first_for_ever())
    rows = [parity.compare(engine(), stale, inputs(seed), noise(seed)) for seed in (0, 1)]
    assert failed(rows[:1]) == set()
    found = failed(rows)
    assert "K layer 0, cosine" in found
    assert "actions, worst cosine" in found
    assert parity.summarise(rows).worst_observation == 1


def test_a_missing_scale_fails_and_points_at_the_stage():
    unscaled = engine(scale={"embedding.weight": 32**-0.5})
    found = failed([parity.compare(engine(), unscaled, inputs(), noise())])
    assert "prefix embeddings, relative L2" in found
    assert "vision tokens, relative L2" not in found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nan_in_one_action_fails(precision):
    def broken(inner, cache, noise, trace):
        out = inner.denoise(cache, noise, trace=trace).clone()
        out[1, 3, 5] = math.nan
        return out

    rows = [parity.compare(engine(), one, inputs(), noise()) for one in (engine(), Wrong(engine(), denoise=broken))]
    assert {"actions, mean cosine", "actions, worst cosine"} <= failed(rows, precision)
    plain = parity.summarise(rows[:1])
    marks = parity.judge_against_plain(parity.summarise(rows), plain, name=precision)
    assert [mark.what for mark in marks if not mark.passed] == [f"actions, relative L2 against plain {precision}"]


def test_caches_that_are_overwritten_are_compared_as_they_were():
    """A backend may reuse its buffers in denoise; parity must have copied by then."""

    def reuse(inner, cache, noise, trace):
        out = inner.denoise(cache, noise, trace=trace)
        for tensor in (*cache.k, *cache.v):
            tensor.zero_()
        return out

    row = parity.compare(engine(), Wrong(engine(), denoise=reuse), inputs(), noise())
    assert failed([row]) == set()


def test_engines_with_different_steps_cannot_be_compared():
    with pytest.raises(ShapeError, match=r"denoise steps.*got 3.*wanted 4"):
        parity.compare(engine(), engine(steps=3), inputs(), noise())


def test_robot_units_go_through_the_whole_action_transform():
    def metres(chunk):
        return chunk[:, :3] * np.array([0.1, 1.0, 10.0]) + 5.0

    def off(inner, cache, noise, trace):
        out = inner.denoise(cache, noise, trace=trace).clone()
        out[0, 2, 1] += 0.25
        return out

    row = parity.compare(
        engine(), Wrong(engine(), denoise=off), inputs(), noise(), robot_units=metres, units=("m", "rad")
    )
    assert row.robot.units == ("m", "rad", "")
    assert row.robot.max_abs == pytest.approx((0, 0.25, 0), abs=1e-6)
    assert row.robot.mean_abs == pytest.approx((0, 0.25 / 14, 0), abs=1e-6)
    assert all(span > 0 for span in row.robot.reference_range)


def test_bounds_grow_with_depth_only_where_stated():
    summary = parity.summarise([parity.compare(engine(), engine(), inputs(), noise())])

    def wanted(marks):
        return {mark.what: mark.wanted for mark in parity.judge(summary, marks, vision_layers=2, layers=3)}

    fp8 = wanted(parity.FP8_MARKS)
    assert fp8["K layer 0, relative L2"] == pytest.approx(3.6e-2 * math.sqrt(2 + 2 + 1))
    assert fp8["velocity step 0, relative L2"] == pytest.approx(3.6e-2 * math.sqrt(2 + 2 + 6))
    assert fp8["velocity step 3, relative L2"] == pytest.approx(3.6e-2 * math.sqrt(2 + 2 + 3 + 4 * 3))
    assert fp8["actions, relative L2"] == pytest.approx(3.6e-2 * math.sqrt(2 + 2 + 6))
    assert {v for k, v in wanted(parity.FLOAT32_MARKS).items() if "L2" in k} == {1e-5}


def test_bfloat16_has_the_absolute_marks_that_were_stated_and_no_others():
    summary = parity.summarise([parity.compare(engine(), engine(), inputs(), noise())])
    marks = parity.judge(summary, parity.marks_for("bfloat16"), vision_layers=2, layers=3)
    wanted = {mark.what: (mark.rule, mark.wanted) for mark in marks}
    kv = {f"{name} layer {i}, cosine": ("at least", 0.99) for name in "KV" for i in range(3)}
    actions = {"actions, mean cosine": ("at least", 0.999), "actions, worst cosine": ("at least", 0.995)}
    assert wanted == kv | actions


def test_two_error_rule():
    """Twice the error of plain bfloat16 is the limit: a better or equal engine passes, a sloppier one does not."""
    rows = [(inputs(seed), noise(seed)) for seed in range(2)]
    plain = parity.summarise([parity.compare(engine(), engine(precision="bfloat16"), *row) for row in rows])
    assert all(mark.passed for mark in parity.judge_against_plain(plain, plain, name="bfloat16"))

    def coarse(inner, given, trace):
        cache = inner.prefill(given, trace=trace)
        return dataclasses.replace(cache, v=tuple(v * 1.03 for v in cache.v))

    sloppy = Wrong(engine(precision="bfloat16"), prefill=coarse)
    found = parity.summarise([parity.compare(engine(), sloppy, *row) for row in rows])
    wrong = [mark.what for mark in parity.judge_against_plain(found, plain, name="bfloat16") if not mark.passed]
    assert {f"V layer {i}, relative L2 against plain bfloat16" for i in range(3)} <= set(wrong)
    assert not [what for what in wrong if what.startswith("K")]
