"""The pattern of each head: made attention whose pattern is known, and a decoder on a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tests.sparse.methods.test_minference import best_blocks, edges, lines, token_pattern, touched
from tokcc.analysis.head_numbers import Heard
from tokcc.errors import UsageError
from tokcc.pipeline import profile
from tokcc.pipeline.profiling_patterns import PatternSearch

TOKENS, BLOCK = 64, 4


def attention(looks: list[Callable[[int], list[int]]], hidden: int = 0) -> Heard:
    """Heads that look at given keys of every query: keys are unit vectors.

    Of the first ``hidden`` heads the keys of every block add up to nothing, so that means say nothing of them.
    """
    key = torch.eye(TOKENS).repeat(len(looks), 1, 1)
    blocks = key[:hidden].unflatten(1, (-1, BLOCK))
    key[:hidden] = (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)
    query = torch.zeros(len(looks), TOKENS, TOKENS)
    for head, look in enumerate(looks):
        for row in range(TOKENS):
            query[head, row, [j for j in look(row) if 0 <= j <= row] or [row]] = 12.0
    return Heard(0, query, key, key, 0, 1.0, 0.0)


def rated_block(row: int) -> list[int]:
    """A block of its own for every row of blocks, of no column and no distance."""
    block = (row // BLOCK * 7 + 3) % (row // BLOCK + 1)
    return list(range(block * BLOCK, (block + 1) * BLOCK))


def near(row: int) -> list[int]:
    return list(range(row - 9, row + 1))


def test_heads_get_the_pattern_they_were_made_with() -> None:
    heard = attention([lambda row: [21, 42], lambda row: [row - 30], near, rated_block], hidden=2)
    search = PatternSearch(TOKENS, BLOCK, 0.4)
    search.hear(heard)
    (row,) = search.found()
    assert [pattern["kind"] for pattern in row[:2]] == ["columns_and_distances"] * 2
    assert row[3] == {"kind": "best_rated", "score": {"kind": "pooled", "length": "mean", "probability": False},
                      "share": "each", "sinks": 0, "local": 0, "own": True, "blocks": row[3]["blocks"]}  # fmt: skip
    probs = heard.probs.numpy()
    for head in range(4):
        table = read_by(row[head], heard, head)
        assert table.sum() <= 0.4 * np.tril(np.ones(table.shape)).sum()
        assert (spread(table) * probs[head]).sum() / TOKENS > 0.95


def read_by(pattern: dict[str, Any], heard: Heard, head: int) -> Any:
    given = {name: pattern[name] for name in ("columns", "distances", "queries", "first", "near") if name in pattern}
    if pattern["kind"] == "first_and_near":
        return touched(edges(TOKENS, TOKENS, **given), BLOCK)
    query, key = heard.query[head].double().numpy(), heard.key[head].double().numpy()
    if pattern["kind"] == "best_rated":
        return best_blocks(query, key, pattern["blocks"], BLOCK)
    return touched(token_pattern(*lines(query, key, 1.0, **given), TOKENS, TOKENS), BLOCK)


def spread(table: Any) -> Any:
    return table.repeat(BLOCK, 0).repeat(BLOCK, 1)


def test_what_cannot_be_kept_to_is_kept_small() -> None:
    search = PatternSearch(TOKENS, BLOCK, 0.01)
    search.hear(attention([near]))
    ((pattern,),) = search.found()
    assert read_by(pattern, attention([near]), 0).sum() == TOKENS // BLOCK  # the own blocks alone


@pytest.mark.slow
def test_a_profile_with_a_text_serves_minference(tmp_path: Path) -> None:
    folder, path = model_folder(tmp_path / "model"), tmp_path / "heads.json"
    text = np.random.default_rng(0).integers(3, 97, 400)
    made = profile(folder, tokens=64, block=4, data=text)
    assert made.patterns is not None
    assert [len(row) for row in made.patterns] == [4, 4, 4]
    made.save(path)
    step = {"preset": "minference", "profile": str(path), "block": 4, "length": 0}
    bundle = compiled(folder, tmp_path / "bundle", {"version": 1, "name": "m", "steps": [step]})
    lock = (bundle.path / "policy.lock.yaml").read_text()
    assert str(path) not in lock
    assert made.patterns[2][3]["kind"] in lock
    with pytest.raises(UsageError, match="out of range"):
        profile(folder, tokens=64, block=60, data=text)
