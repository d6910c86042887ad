"""Every registered backend passes the suite, and the suite catches backends that are broken on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from suite import CHECKS, Subject

from vivace.backends import base, eager
from vivace.config import GemmaConfig, VisionConfig

FEW_LAYERS = {
    "vision": VisionConfig(width=24, layers=1, mlp_width=40, num_heads=2, patch_size=14, image_size=56),
    "prefix": GemmaConfig(width=32, layers=2, mlp_width=48, num_heads=8, num_kv_heads=1, head_dim=16),
    "expert": GemmaConfig(width=16, layers=2, mlp_width=28, num_heads=8, num_kv_heads=1, head_dim=16),
}
"""torch.compile takes minutes for the usual network. Two layers are enough: a first and a last."""


def _available(name: str) -> str | None:
    return base.why_not(name, device="cpu")


@pytest.fixture(scope="module")
def subjects():
    """One backend per (name, kind), kept for the module: compiling is slow."""
    built: dict[tuple[str, str], Subject] = {}

    def get(name: str, kind: str) -> Subject:
        if (name, kind) not in built:
            fewer = {"config_changes": FEW_LAYERS} if name == "compiled" else {}
            built[name, kind] = Subject(lambda model, config: base.build(name, model, config), kind, **fewer)
        return built[name, kind]

    return get


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("name", base.BACKENDS)
def test_backend(subjects, name, kind, check):
    if reason := _available(name):
        pytest.skip(f"{name}: {reason}")
    CHECKS[check](subjects(name, kind))


class Sabotaged(eager.EagerBackend):
    """An eager backend with one planted fault."""

    fault = ""

    def prefill(self, inputs, *, trace=None, spans=None):
        if self.fault == "mask ignored":
            inputs = replace(inputs, view_mask=None, token_mask=None)
        if self.fault == "stale image" and (kept := getattr(self, "images", None)) is not None:
            inputs = replace(inputs, images=kept) if kept.shape == inputs.images.shape else inputs
        self.images = inputs.images
        cache = super().prefill(inputs, trace=trace, spans=spans)
        if self.fault == "stale cache":
            self.cache = cache = getattr(self, "cache", cache) if self._same(cache) else cache
        if self.fault == "wrong length":
            cache = replace(cache, length=cache.length + 1)
        if self.fault == "missing scale":
            cache = replace(cache, v=(cache.v[0] * 1.01, *cache.v[1:]))
        return cache

    def _same(self, cache) -> bool:
        kept = getattr(self, "cache", None)
        return kept is not None and kept.k[0].shape == cache.k[0].shape

    def denoise(self, cache, noise, *, previous=None, trace=None, spans=None):
        if self.fault == "committed ignored":
            previous = None
        out = super().denoise(cache, noise, previous=previous, trace=trace, spans=spans)
        return out + torch.rand(1) * 1e-7 if self.fault == "not repeatable" else out


@pytest.mark.parametrize("fault", [
    "mask ignored", "stale image", "stale cache", "wrong length", "missing scale", "committed ignored", "not repeatable",
])  # fmt: skip
def test_the_suite_catches(fault):
    broken = type("Broken", (Sabotaged,), {"fault": fault})
    subject = Subject(lambda model, config: broken(model, config), "pi05")
    caught = []
    for name, check in CHECKS.items():
        try:
            check(subject)
        except AssertionError:
            caught.append(name)
    assert caught, f"no check noticed: {fault}"


def test_unknown_backend_is_named():
    with pytest.raises(base.ConfigError, match="eager"):
        base.why_not("eagre", device="cpu")
