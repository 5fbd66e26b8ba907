"""Compile a small decoder with sparse attention and compare it with the oracle, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.decoders.engine import Engine, build, tokens
from tests.decoders.tiny import model_of
from tests.sparse.oracle import Eviction, Rule, run_sparse

__all__ = ["CALLS", "assert_equals_rule", "policy"]

CALLS = (37, 1, 1, 18, 1, 1, 1)
"""A prompt that fills no whole number of blocks, single tokens, a second piece of text that begins inside a block."""


def policy(preset: str, **arguments: Any) -> dict[str, Any]:
    """One step of a preset."""
    return {"version": 1, "name": preset, "steps": [{"preset": preset, **arguments}]}


def assert_equals_rule(
    family: str,
    wanted: Mapping[str, Any],
    rule: Rule,
    folder: Path,
    *,
    calls: Sequence[int] = CALLS,
    padding: Sequence[int] = (0, 8, 16),
    tolerance: float = 2e-4,
    evict: Eviction | None = None,
) -> Engine:
    """Every row of a padded batch gives what it gives alone under the rule.

    Args:
        family: Of ``tests.decoders.tiny``.
        wanted: The policy.
        rule: What queries read.
        folder: For the engine.
        calls: New tokens of each call.
        padding: Of each row; whole blocks, whose grid begins at the first slot.
        tolerance: Of the logits, as a share of the largest.
        evict: What goes out of the caches after every call.
    """
    engine = build(family, wanted, folder)
    ids, mask = tokens(len(padding), sum(calls), padding)
    logits, _ = engine.run(ids, mask, calls)
    for row, count in enumerate(padding):
        alone: Any = run_sparse(model_of(family), ids[row, count:], [calls[0] - count, *calls[1:]], rule, evict=evict)
        alone = alone.numpy()
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=tolerance * float(np.abs(alone).max()))
    return engine
