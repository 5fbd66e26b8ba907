"""Columns and distances of the attention map: what the last queries look at, and the blocks that such lines touch."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_from
from tokcc.passes.capping import capped
from tokcc.passes.sparse.cut import SparseCut

__all__ = ["among_last", "at_blocks", "blocks_of_columns", "blocks_of_distances", "last_probabilities", "last_queries"]

aten = torch.ops.aten
ops = torch.ops.tokcc


def last_queries(cut: SparseCut, most: int) -> tuple[Any, Any]:
    """Return the call's last queries ``[B, H, R, D]`` and 1 for those that are no padding, fp32 ``[B, R]``."""
    b = cut.b
    count = b.min_sizes(most, cut.new)
    start = b.sub_sizes(cut.new, count)
    return run_from(b, cut.query, 2, start, count), b.cast(run_from(b, cut.real_rows, 1, start, count), torch.float32)


def among_last(b: Builder, places: Any, count: Any) -> Any:
    """Return which of ``0, 1, ...`` are the last ones, bool of the same shape ``[N]``; there are at least so many."""
    first = b.sub_sizes(b.size(places, 0), count)
    start = b.call(aten.select.int, run_from(b, places, 0, first, count), 0, 0)
    return b.compare("ge", places, start)


def last_probabilities(cut: SparseCut, most: int) -> tuple[Any, Any]:
    """Return what the call's last queries attend to, fp32 ``[B, H, R, L]``, and how many there are, ``[B, 1, 1]``.

    Queries that are padding have zeros.
    """
    b = cut.b
    query, real = last_queries(cut, most)
    logits = capped(b, b.mul(cut.products(query, cut.key), cut.scale), cut.softcap)
    own = run_from(b, cut.slots, 0, b.sub_sizes(cut.total, b.size(query, 2)), b.size(query, 2))
    earlier = b.compare("le", b.unsqueeze(cut.slots, 0), b.unsqueeze(own, 1))  # [R, L]
    seen = b.logical_and(earlier, b.unsqueeze(b.unsqueeze(cut.real, 1), 1))  # [B, 1, R, L]
    probs = b.mul(b.softmax(b.where(seen, logits, -1e30), 3), b.unsqueeze(b.unsqueeze(real, 1), 3))
    return probs, b.unsqueeze(b.sum(real, 1, keepdim=True), 1)


def blocks_of_columns(cut: SparseCut, columns: Any) -> Any:
    """Return the blocks in which columns bool ``[B, Hs, L]`` lie, bool ``[B, Hs, 1, M]``."""
    b = cut.b
    inside = b.amax(cut.by_key(b.cast(columns, torch.float32), 2), 3)
    return b.unsqueeze(b.compare("gt", inside, 0), 2)


def blocks_of_distances(cut: SparseCut, distances: Any) -> Any:
    """Return the blocks that lie so far from a row, bool ``[B, Hs, MQ, M]``.

    Args:
        cut: The call.
        distances: bool ``[B, Hs, L]``: slots between a query and a key. A block is touched when any of them leads from
            any query of the row into it; queries from P on are P apart from slot 0, wherever blocks begin.
    """
    b = cut.b
    many = b.call(aten.cumsum.default, b.cast(distances, torch.int64), 2)
    none = b.full([b.size(many, 0), b.size(many, 1), 1], 0, torch.int64, many)
    nearer = b.cat([none, many], 2)  # [B, Hs, L + 1]: how many are less than n
    shortest = b.sub(b.unsqueeze(cut.first_slots, 1), b.add(cut.block_starts, cut.block_k - 1))  # [MQ, M]
    longest = b.sub(b.unsqueeze(cut.last_slots, 1), cut.block_starts)
    low, high = (b.call(aten.clamp_min.default, x, 0) for x in (shortest, b.add(longest, 1)))
    return b.compare("gt", at_blocks(cut, nearer, high), at_blocks(cut, nearer, low))


def at_blocks(cut: SparseCut, x: Any, place: Any) -> Any:
    """Read ``[B, Hs, N]`` at places int64 ``[MQ, M]``: ``[B, Hs, MQ, M]``."""
    b = cut.b
    flat = b.call(aten.index_select.default, x, 2, b.call(aten.flatten.using_ints, place, 0, 1))
    return b.reshape(flat, [b.size(x, 0), b.size(x, 1), cut.rows, cut.blocks])
