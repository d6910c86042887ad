"""The parity test must fail for every engine that is wrong: that is what it is for."""

import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch

from vivace.backends import eager
from vivace.check import parity
from vivace.config import EngineConfig
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
    def all_valid(inner, cache, noise, trace):
        return inner.denoise(dataclasses.replace(cache, mask=torch.ones_like(cache.mask)), noise, trace=trace)

    row = parity.compare(engine(), Wrong(engine(), denoise=all_valid), inputs(padded=True), noise())
    found = failed([row])
    assert "velocity step 0, relative L2" in found
    assert not any(what.startswith(("K", "V")) for what in found), "the first bad stage is the denoise step"

    def padding_attended(inner, given, trace):
        right = inner.prefill(given, trace=trace)
        wrong = inner.prefill(dataclasses.replace(given, token_mask=None))
        return dataclasses.replace(wrong, mask=right.mask, length=right.length)

    row = parity.compare(engine(), Wrong(engine(), prefill=padding_attended), inputs(padded=True), noise())
    assert "K layer 1, relative L2" in failed([row])


def test_a_mask_error_that_hides_in_bfloat16_is_caught_in_float32():
    """Two padding tokens of 38, attended by the expert only: why a new engine is judged in float32 first."""

    def all_valid(inner, cache, noise, trace):
        return inner.denoise(dataclasses.replace(cache, mask=torch.ones_like(cache.mask)), noise, trace=trace)

    row = parity.compare(engine(), Wrong(engine(), denoise=all_valid), inputs(padded=True), noise())
    assert failed([row], "bfloat16") == set()
    assert failed([row], "float32")


def test_a_stale_cache_fails():
    kept = []

    def first_for_ever(inner, given, trace):
        kept.append(inner.prefill(given, trace=trace))
        return kept[0]

    stale = Wrong(engine(), prefill=first_for_ever)
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
    assert "prefix embeddings, relative L2" in failed(
        [parity.compare(engine(), unscaled, inputs(), noise())], "bfloat16"
    )
    assert "vision tokens, relative L2" not in found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nan_in_one_action_fails(precision):
    def broken(inner, cache, noise, trace):
        out = inner.denoise(cache, noise, trace=trace).clone()
        out[1, 3, 5] = math.nan
        return out

    rows = [parity.compare(engine(), one, inputs(), noise()) for one in (engine(), Wrong(engine(), denoise=broken))]
    assert {"actions, relative L2", "actions, mean cosine", "actions, worst cosine"} <= failed(rows, precision)


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

    def wanted(precision):
        marks = parity.judge(summary, parity.marks_for(precision), vision_layers=2, layers=3)
        return {mark.what: mark.wanted for mark in marks}

    wide = wanted("bfloat16")
    assert wide["K layer 0, relative L2"] == pytest.approx(5e-3 * math.sqrt(2 + 2 + 1))
    assert wide["velocity step 0, relative L2"] == pytest.approx(5e-3 * math.sqrt(2 + 2 + 6))
    assert wide["velocity step 3, relative L2"] == pytest.approx(5e-3 * math.sqrt(2 + 2 + 3 + 4 * 3))
    assert wide["actions, relative L2"] == pytest.approx(5e-3 * math.sqrt(2 + 2 + 6))
    assert set(v for k, v in wanted("float32").items() if "L2" in k) == {1e-5}
    assert wide["K layer 0, cosine"] == 0.99


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
