"""From ratings to lists of blocks."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import HIDDEN, BlockList, SparseCut

__all__ = ["best_of", "best_within", "first_of", "most_of", "ranked", "table_list"]

aten = torch.ops.aten


def most_of(cut: SparseCut, budget: Count) -> tuple[Any, Any]:
    """Return how many blocks a budget allows in the batch and in each sample, int64 ``[B, 1, 1, 1]`` or None = as many.

    A share is one of the blocks that a sample has without its padding.
    """
    b = cut.b
    most = budget.kept(b, cut.blocks, cut.blocks)
    if budget.kind != "share" or budget.nothing:
        return most, None
    filled = b.sum(b.cast(b.compare("gt", cut.counts, 0), torch.int64), 1, keepdim=True)
    return most, b.unsqueeze(b.unsqueeze(budget.kept_per_sample(b, filled, filled), 2), 3)


def ranked(cut: SparseCut, rating: Any, most: Any) -> tuple[Any, Any]:
    """Return the best blocks, best first: ratings and places, ``[B, Hs, MQ, most]``."""
    best = cut.b.call(aten.topk.default, rating, most, -1, True, True)
    values, places = cut.b.parts(best, 2)
    return values, places


def best_of(cut: SparseCut, rating: Any, most: Any, wanted: Any = None) -> Any:
    """Return the best of the last axis as a table, bool of the rating's shape ``[..., N]``.

    Args:
        cut: The call.
        rating: fp32; what nobody sees is never among the best.
        most: How many, at most N.
        wanted: How many of those, int64 with 1 for the last axis; None = all.
    """
    b = cut.b
    axis = len(b.shape(rating)) - 1
    values, places = b.parts(b.call(aten.topk.default, rating, most, -1, True, True), 2)
    taken = b.compare("gt", values, HIDDEN / 2)
    if wanted is not None:
        taken = b.logical_and(taken, b.compare("lt", b.arange(b.size(places, axis), places), wanted))
    none = b.full([b.size(rating, i) for i in range(axis + 1)], False, torch.bool, rating)
    return b.scatter(none, axis, places, taken)


def best_within(cut: SparseCut, mass: Any, limit: Any) -> tuple[Any, Any]:
    """Return the largest of the last axis whose sum is at most a limit.

    Args:
        cut: The call.
        mass: fp32 ``[..., N]``, not negative.
        limit: A number, or fp32 with 1 for the last axis.

    Returns:
        Them as a table, bool ``[..., N]``, and how many they are, int64 ``[..., 1]``.
    """
    b = cut.b
    axis = len(b.shape(mass)) - 1
    values, places = b.parts(b.call(aten.topk.default, mass, b.size(mass, axis), -1, True, True), 2)
    inside = b.compare("le", b.call(aten.cumsum.default, values, axis), limit)
    none = b.full([b.size(mass, i) for i in range(axis + 1)], False, torch.bool, mass)
    return b.scatter(none, axis, places, inside), b.sum(b.cast(inside, torch.int64), axis, keepdim=True)


def first_of(cut: SparseCut, values: Any, places: Any, wanted: Any) -> BlockList:
    """Return the first blocks of a ranking: in ascending order for rows of queries, which read neighbours then.

    Args:
        cut: The call.
        values: Ratings, best first, ``[B, Hs, MQ, K]``; what nobody sees is left out.
        places: Their blocks, int64.
        wanted: How many of them, int64 ``[B or 1, Hs or 1, MQ, 1]``; None = all.
    """
    b = cut.b
    taken = b.compare("gt", values, HIDDEN / 2)
    if wanted is not None:
        order = b.arange(b.size(places, 3), places)
        taken = b.logical_and(taken, b.compare("lt", order, wanted))
    if cut.single:  # sorting takes longer than it gains
        return BlockList(places, b.sum(b.cast(taken, torch.int64), 3))
    return _ascending(cut, b.where(taken, places, _NOWHERE), taken)


def table_list(cut: SparseCut, table: Any) -> BlockList:
    """Return the blocks that a table bool ``[B, Hs, MQ, M]`` says yes to."""
    b = cut.b
    place = b.arange(cut.blocks, cut.key)
    return _ascending(cut, b.where(table, place, _NOWHERE), table)


_NOWHERE = 2**40


def _ascending(cut: SparseCut, places: Any, taken: Any) -> BlockList:
    """Sort what was taken; behind it stands the last block that was."""
    b = cut.b
    count = b.sum(b.cast(taken, torch.int64), 3)
    ordered = b.parts(b.call(aten.topk.default, places, b.size(places, 3), -1, False, True), 2)[0]
    last = b.amax(b.where(taken, places, 0), 3, keepdim=True)
    return BlockList(b.call(aten.minimum.default, ordered, last), count)
