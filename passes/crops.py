"""Crops of one image: the batch axis of an image encoder that gets a large image as a thumbnail and its parts.

A budget for the whole image leaves every crop a number of tokens of its own. They stand in slots, those that a crop
does not fill are empty, and the sum of all is fixed.
"""

from __future__ import annotations

from typing import Any

import torch

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import HIGHEST, around, keep_counted, topk

__all__ = ["best_flags", "crop_sizes", "keep_flagged", "proportional", "within_quotas"]

aten = torch.ops.aten


def crop_sizes(cut: Cut) -> tuple[int, int, int]:
    """Return the number of crops, of candidates in each, and of those that the budget leaves of the whole image."""
    crops, size = cut.batch.size, cut.candidates
    if cut.valid is not None:
        cut.ctx.fail("the tokens of crops are padded", help="use a model without a padding mask")
    if not isinstance(crops, int) or not isinstance(size, int):
        cut.ctx.fail(
            "the batch axis is the crops of one image, and their number is not fixed",
            needed="a fixed batch and a fixed number of tokens",
            help="export the model for one number of crops",
        )
    kept = cut.count.kept(cut.b, crops * size, crops * size)
    return crops, size, int(kept)


def proportional(cut: Cut, counts: Any, total: int) -> Any:
    """Split a number in proportion to counts, rounded down: int64 ``[G]``."""
    b = cut.b
    every = b.call(aten.clamp_min.default, b.sum(counts, 0), 1)
    return b.call(aten.div.Tensor_mode, b.mul(counts, total), every, rounding_mode="floor")


def best_flags(cut: Cut, rating: Any, count: int) -> Any:
    """Mark the ``count`` best of each row of ``[G, M]``: int64 1 and 0."""
    b = cut.b
    rows, size = b.shape(rating)
    zeros = b.full([rows, size], 0, torch.int64, cut.x)
    ones = b.full([rows, count], 1, torch.int64, cut.x)
    return b.scatter(zeros, 1, topk(b, rating, count, in_order=False), ones) if count else zeros


def within_quotas(cut: Cut, rating: Any, quota: Any, total: int | None = None) -> Any:
    """Mark the best of each row up to its quota: int64 1 and 0, ``[G, M]``.

    Args:
        cut: The cut.
        rating: fp32 ``[G, M]``.
        quota: int64 ``[G]``.
        total: Mark as many in all rows together: the best unmarked ones fill up what rounding left of quotas, whose sum
            is at most this.
    """
    b = cut.b
    rows, size = b.shape(rating)
    order = topk(b, rating, size, in_order=False)
    inside = b.cast(b.compare("lt", b.arange(size, cut.x), b.unsqueeze(quota, 1)), torch.int64)  # [G, M] by rank
    flags = b.scatter(b.full([rows, size], 0, torch.int64, cut.x), 1, order, inside)
    if total is None:
        return flags
    key = b.where(b.compare("gt", flags, 0), HIGHEST, rating)
    return b.reshape(best_flags(cut, b.reshape(key, [1, rows * size]), total), [rows, size])


def keep_flagged(cut: Cut, flags: Any, slots: int, score: Any = None) -> Kept:
    """Keep the marked candidates of each crop, in sequence order.

    Args:
        cut: The cut.
        flags: int64 ``[P, M]``: 1 and 0.
        slots: More than any crop has.
        score: For the reducer.
    """
    b = cut.b
    rating = around(cut, b.cast(flags, torch.float32))
    return keep_counted(cut, rating, slots, b.sum(flags, 1), score)
