"""What selectors share that pick a set of tokens one by one."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import HIGHEST, LOWEST, around, keep_indices, masked

__all__ = ["candidates_valid", "extremes", "kept_set", "last_resort", "min_max", "refuse_padded_share"]

aten = torch.ops.aten


def candidates_valid(cut: Cut) -> Any:
    """Return which candidates are real, bool ``[B, M]``, or None when all are."""
    return None if cut.valid is None else cut.inner(cut.valid)


def refuse_padded_share(cut: Cut) -> None:
    """Refuse budgets that would give padded samples sets of different sizes.

    Picks come back as a set, so it cannot be cut off where a shorter sample would have stopped.
    """
    if cut.valid is not None and cut.count.kind != "tokens":
        cut.ctx.fail(
            "greedy selection keeps the same number of tokens in every sample of a padded batch",
            help="use `budget: {tokens: K}`, or a model without a padding mask",
        )


def last_resort(cut: Cut, like: Any) -> Any:
    """Return fp32 ``[B, M]``: 0, and the lowest score for padding, which is picked when nothing else is left."""
    zeros = cut.b.call(aten.zeros_like.default, like)
    valid = candidates_valid(cut)
    return zeros if valid is None else cut.b.where(valid, zeros, LOWEST)


def kept_set(cut: Cut, index: Any, kept: Any) -> Kept:
    """Keep the protected tokens and a set of candidates, int64 ``[B, kept]``, ascending."""
    b = cut.b
    if cut.valid is None:
        return Kept(cut.with_protected(index), None, True, b.add_sizes(kept, cut.first + cut.last))
    # Padding is picked last, so a sample with fewer than K real tokens has all of them picked.
    picked = b.full([cut.batch.size, kept], 1.0, torch.float32, cut.x)
    zeros = b.full([cut.batch.size, cut.candidates], 0.0, torch.float32, cut.x)
    return keep_indices(cut, masked(cut, around(cut, b.scatter(zeros, 1, index, picked))), kept)


def extremes(b: Builder, score: Any, valid: Any) -> tuple[Any, Any]:
    """Return the lowest and the highest score of each sample, ``[B, 1]``; padding is neither."""
    low = b.amin(score if valid is None else b.where(valid, score, HIGHEST), 1, keepdim=True)
    return low, b.amax(score if valid is None else b.where(valid, score, LOWEST), 1, keepdim=True)


def min_max(
    b: Builder,
    score: Any,
    valid: Any,
    *,
    guard: float = 1e-6,
    floor: float = 0.0,
    over: Literal["sample", "batch"] = "sample",
) -> Any:
    """Scale ``[B, M]`` to ``(s - min + floor) / (max - min + guard)``; padding takes no part in either extreme."""
    low, high = extremes(b, score, valid)
    if over == "batch":
        low, high = b.amin(low, 0, keepdim=True), b.amax(high, 0, keepdim=True)
    above = b.sub(score, low)
    return b.div(b.add(above, floor) if floor else above, b.add(b.sub(high, low), guard))
