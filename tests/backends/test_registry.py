"""The registry says of every backend what its module can do: a row that forgets it would leave that unused, silently."""

from __future__ import annotations

import importlib
import inspect

import pytest

from vivace.backends import base


@pytest.mark.parametrize("name", base.BACKENDS)
def test_a_row_says_what_its_module_has(name):
    row = base.BACKENDS[name]
    module = importlib.import_module(row.module)
    has = {
        "judges_model": hasattr(module, "why_not_model"),
        "reads_options": "config" in inspect.signature(module.why_not).parameters,
        "audits_plan": "plan" in inspect.signature(module.create).parameters,
    }
    assert has == {field: getattr(row, field) for field in has}


def test_a_network_that_does_not_fit_is_refused_by_every_backend_that_judges(monkeypatch):
    """`why_not` asks the module that the row names."""
    for name, row in base.BACKENDS.items():
        if not row.judges_model:
            continue
        module = importlib.import_module(row.module)
        monkeypatch.setattr(module, "why_not", lambda **options: None)
        monkeypatch.setattr(module, "why_not_model", lambda model: "too wide")
        assert base.why_not(name, device="cuda", model=object()) == "too wide"
        assert base.why_not(name, device="cuda") is None
