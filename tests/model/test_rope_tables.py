"""Precomputed rotary tables give the same bits as computing the angles: sliced without a mask, gathered with one."""

from __future__ import annotations

import pytest
import torch
from tiny import build, random_tensors, tiny_config

from vivace.types import ModelInputs


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("masked", [False, True])
def test_tables_change_no_bit(kind, masked):
    config = tiny_config(kind)
    model, size = build(config, random_tensors(config)), config.vision.image_size
    tokens = torch.arange(6)[None]
    inputs = ModelInputs(
        torch.rand(1, 2, 3, size, size), tokens, token_mask=tokens < 4 if masked else None, state=torch.randn(1, 32)
    )
    x, table, answers = torch.randn(1, config.horizon, 32), model.time_table(3), []
    for tables in (None, model.rope_tables(100)):
        embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
        cache = model.prefill(embeds, mask, state=inputs.state, tables=tables)
        context = model.suffix_context(cache, config.horizon, tables=tables)
        answers.append((cache.k[-1], model.denoise_step(x, table.at(1), cache, context)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
