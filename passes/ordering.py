"""Index arithmetic that selectors share."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cut import Cut, Kept

__all__ = ["LOWEST", "ascending", "keep_indices", "masked", "topk", "valid_first"]

LOWEST = -1e30
"""Score of what must lose against every real score; finite, so that it survives arithmetic."""


def topk(b: Builder, score: Any, k: Any, *, in_order: bool) -> Any:
    """Return int64 ``[B, k]`` positions of the largest scores; ties to the lower position."""
    return b.call(torch.ops.tokcc.topk_select.default, score, k, in_order)


def ascending(b: Builder, index: Any) -> Any:
    """Sort int64 ``[B, K]`` ascending."""
    import operator

    return b.call(operator.getitem, b.call(torch.ops.aten.sort.default, index, 1, False), 0)


def masked(cut: Cut, score: Any) -> Any:
    """Give padding the lowest score: ``[B, N]`` over all tokens."""
    b = cut.b
    score = b.cast(score, torch.float32)
    return score if cut.valid is None else b.where(cut.valid, score, LOWEST)


def valid_first(b: Builder, valid: Any, size: Any) -> Any:
    """Return the stable order that puts real slots before empty ones: int64 ``[B, K]``."""
    return topk(b, b.cast(valid, torch.int32), size, in_order=False)


def keep_indices(cut: Cut, score: Any, kept: Any, *, score_for_reducer: Any = None) -> Kept:
    """Keep the protected tokens and the ``kept`` best candidates, in sequence order.

    With padding, each sample keeps the number of tokens it would keep alone; its slots beyond that are empty and come
    last.

    Args:
        cut: The cut.
        score: ``[B, N]``, padding at the lowest.
        kept: Number of candidates to keep (int or size handle).
        score_for_reducer: Passed on.
    """
    b = cut.b
    candidates = cut.inner(score)
    size = b.add_sizes(kept, cut.first + cut.last)
    if cut.valid is None:
        index = cut.with_protected(topk(b, candidates, kept, in_order=True))
        return Kept(index, None, True, size, score_for_reducer)
    real = cut.valid_count()
    initial = cut.initial_valid_count() if cut.count.of_initial else real
    per_sample = b.unsqueeze(cut.count.kept_per_sample(b, real, initial), 1)  # [B, 1]
    best = topk(b, candidates, kept, in_order=False)  # [B, kept]
    rank = b.arange(kept, cut.x)
    filled = b.compare("lt", rank, per_sample)  # [B, kept]
    # Sort by position with the empty slots at the end.
    key = b.where(filled, best, b.add(best, cut.tokens))
    key = ascending(b, key)
    filled = b.compare("lt", key, cut.tokens) if isinstance(cut.tokens, int) else b.call(
        torch.ops.aten.lt.Scalar, key, cut.tokens
    )
    index = b.where(filled, key, b.sub(key, cut.tokens))
    keep = cut.with_protected(index)
    real_slots = b.gather(cut.valid, 1, keep)
    ends = [b.full([cut.batch.size, n], True, torch.bool, cut.x) for n in (cut.first, cut.last)]
    parts = [ends[0]] * bool(cut.first) + [filled] + [ends[1]] * bool(cut.last)
    valid = b.logical_and(real_slots, b.cat(parts, 1))
    return Kept(keep, valid, True, size, score_for_reducer)
