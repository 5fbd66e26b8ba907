"""Decoders of real architectures, compiled without a policy, equal transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.decoders.engine import CALLS, assert_equals_alone, build, tokens
from tests.decoders.tiny import FAMILIES, model_of, program_of
from tokcc.analysis.cache_sites import cache_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found(family: str) -> None:
    sites = cache_sites(program_of(family))
    assert [site.layer for site in sites] == [0, 1, 2]
    assert [site.past_key for site in sites] == [f"past_key_values_{i}_key" for i in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, tmp_path: Path) -> None:
    """A padded batch in several calls, against transformers on the whole text at once."""
    engine = build(family, "none", tmp_path)
    ids, mask = tokens(3, sum(CALLS), (0, 3, 5))
    logits, last = engine.run(ids, mask, CALLS)
    for row, count in enumerate((0, 3, 5)):
        with torch.no_grad():
            wanted = model_of(family)(input_ids=ids[row : row + 1, count:]).logits[0]
        np.testing.assert_allclose(logits[row, count:], wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))
    lengths = [last[f"present.{i}.key"].shape[2] for i in range(3)]
    windows = {"mistral": [7, 7, 7], "gemma2": [7, sum(CALLS), 7], "gemma3": [7, sum(CALLS), sum(CALLS)]}
    assert lengths == windows.get(family, [sum(CALLS)] * 3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_long_prompts_run_in_blocks(family: str, tmp_path: Path) -> None:
    """Prompts behind the size at which attention goes by blocks of queries, one of them after a past."""
    engine = build(family, "none", tmp_path)
    ids = torch.randint(3, 97, (2, 460), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 460, dtype=torch.int64)
    mask[1, :7] = 0
    logits, _ = engine.run(ids, mask, (129, 1, 330))
    for row, count in ((0, 0), (1, 7)):
        with torch.no_grad():
            wanted = model_of(family)(input_ids=ids[row : row + 1, count:]).logits[0]
        np.testing.assert_allclose(logits[row, count:], wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))


def test_the_oracle_without_a_rule_is_the_model(tmp_path: Path) -> None:
    assert_equals_alone("llama", "none", None, tmp_path)
