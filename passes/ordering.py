"""Index arithmetic that selectors share."""

from __future__ import annotations

import operator
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cut import Cut, Kept

__all__ = ["HIGHEST", "LOWEST", "around", "ascending", "keep_counted", "keep_indices", "masked", "topk"]

aten = torch.ops.aten

LOWEST = -1e30
"""Score of what must lose against every real score; finite, so that it survives arithmetic."""


HIGHEST = -LOWEST
"""Rating of what must stay: above every real score, with no rounding of the others, as an added offset would."""


def topk(b: Builder, score: Any, k: Any, *, in_order: bool) -> Any:
    """Return int64 ``[B, k]`` positions of the largest scores; ties to the lower position."""
    return b.call(torch.ops.tokcc.topk_select.default, score, k, in_order)


def ascending(b: Builder, index: Any) -> Any:
    """Sort int64 ``[B, K]`` ascending."""
    return b.call(operator.getitem, b.call(aten.sort.default, index, 1, False), 0)


def masked(cut: Cut, score: Any) -> Any:
    """Give padding the lowest score: ``[B, N]`` over all tokens."""
    b = cut.b
    score = b.cast(score, torch.float32)
    return score if cut.valid is None else b.where(cut.valid, score, LOWEST)


def around(cut: Cut, rating: Any) -> Any:
    """Put zeros at the protected tokens around a rating of the candidates: fp32 ``[B, M]`` -> ``[B, N]``."""
    b = cut.b

    def zeros(count: int) -> list[Any]:
        return [b.full([cut.batch.size, count], 0.0, torch.float32, cut.x)] if count else []

    parts = [rating]
    if cut.middle is not None:
        place = cut.middle - cut.first
        parts = [b.slice(rating, 1, 0, place), *zeros(1), b.slice(rating, 1, place)]
    return b.cat([*zeros(cut.first), *parts, *zeros(cut.last)], 1)


def keep_indices(
    cut: Cut, score: Any, kept: Any, *, real: Any = None, score_for_reducer: Any = None, in_order: bool = True
) -> Kept:
    """Keep the protected tokens and the ``kept`` best candidates.

    With padding, each sample keeps the number of tokens it would keep alone; its slots beyond that are empty and come
    last.

    Args:
        cut: The cut.
        score: ``[B, N]``, padding at the lowest.
        kept: Number of candidates to keep (int or size handle).
        real: With padding: int64 ``[B]``, the candidates that the budget counts (default: all real ones).
        score_for_reducer: Passed on.
        in_order: In sequence order; otherwise the best first.
    """
    b = cut.b
    candidates = cut.inner(score)
    size = b.add_sizes(kept, cut.protected)
    if cut.valid is None:
        index = cut.with_protected(topk(b, candidates, kept, in_order=in_order))
        if cut.middle is not None:
            place = b.add_sizes(cut.in_front(kept), cut.first) if in_order else None
            return Kept(index, None, False, size, score_for_reducer, middle=place)
        return Kept(index, None, in_order, size, score_for_reducer)
    if cut.last:
        cut.ctx.fail(
            "the last token of a padded sample is padding, so it cannot be protected by its place",
            help="leave `protect.last` out, or use a model without a padding mask",
        )
    real = cut.valid_count() if real is None else real
    initial = cut.initial_valid_count() if cut.count.of_initial else real
    own = cut.count.kept_per_sample(b, real, initial)
    return keep_counted(cut, score, kept, own, score_for_reducer, in_order=in_order)


def keep_counted(
    cut: Cut, score: Any, kept: Any, own: Any, score_for_reducer: Any = None, *, in_order: bool = True
) -> Kept:
    """Keep the protected tokens and each sample's own number of best candidates.

    Args:
        cut: The cut.
        score: ``[B, N]``, padding at the lowest.
        kept: Number of slots for candidates (int or size handle).
        own: int64 ``[B]``: how many of them each sample fills; the others are empty and come last.
        score_for_reducer: Passed on.
        in_order: In sequence order; otherwise the best first.
    """
    b = cut.b
    if cut.middle is not None:
        cut.ctx.fail(
            "samples keep different numbers of tokens, so the token in the middle cannot be kept there",
            help="use a selector that keeps the same number in every sample, such as `topk`, and no padding mask",
        )
    if cut.last:
        cut.ctx.fail(
            "samples keep different numbers of tokens, so the last ones cannot be protected by their place",
            help="leave `protect.last` out, or use a selector that keeps the same number in every sample",
        )
    size = b.add_sizes(kept, cut.first)
    per_sample = b.unsqueeze(own, 1)  # [B, 1]
    best = topk(b, cut.inner(score), kept, in_order=False)  # [B, kept]
    filled = b.compare("lt", b.arange(kept, cut.x), per_sample)  # [B, kept]
    if in_order:
        # Sort by position with the empty slots at the end.
        key = ascending(b, b.where(filled, best, b.add(best, cut.tokens)))
        filled = b.call(aten.lt.Scalar, key, cut.tokens)
        best = b.where(filled, key, b.sub(key, cut.tokens))
    keep = cut.with_protected(best)
    if cut.first:
        filled = b.cat([b.full([cut.batch.size, cut.first], True, torch.bool, cut.x), filled], 1)
    valid = filled if cut.valid is None else b.logical_and(b.gather(cut.valid, 1, keep), filled)
    return Kept(keep, valid, in_order, size, score_for_reducer)
