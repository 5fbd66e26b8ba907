"""What reducers share that average evicted entries into kept ones."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.passes.cache.cut import PROTECTED, CacheCut
from tokcc.passes.cache.piece import ReducedCache

__all__ = ["evicted", "in_cache", "kept_mask", "merge", "merged_rows", "receivers"]


def kept_mask(cut: CacheCut, index: Any) -> Any:
    """Return bool ``[B, Hkv, L]``: slots in ``index`` ``[B, Hkv, K]``."""
    b = cut.b
    nothing = b.full([b.size(cut.key, 0), cut.kv_heads, cut.total], 0, torch.int64, cut.key)
    marks = b.full([b.size(index, 0), cut.kv_heads, b.size(index, 2)], 1, torch.int64, cut.key)
    return b.compare("gt", b.scatter(nothing, 2, index, marks), 0)


def receivers(cut: CacheCut, kept: Any) -> Any:
    """Return bool ``[B, Hkv, L]``: kept entries that others may join: neither protected nor padding."""
    b = cut.b
    free = b.unsqueeze(cut.real, 1)
    protected = cut.protected()
    if protected is not None:
        free = b.logical_and(free, b.logical_not(protected))
    return b.logical_and(kept, free)


def evicted(cut: CacheCut, kept: Any, rating: Any, count: Any) -> Any:
    """Return the best evicted slots and L, a slot that is not there, ascending: int64 ``[B, Hkv, count + 1]``.

    The one that is not there keeps every size above zero.

    Args:
        cut: The cut.
        kept: bool ``[B, Hkv, L]``.
        rating: fp32 ``[B, Hkv, L]``, within ``LOWEST`` and ``PROTECTED``.
        count: Size: at most L - K.
    """
    b = cut.b
    others = b.where(kept, -2 * PROTECTED, rating)
    rated = b.cat([others, _column(cut, 2 * PROTECTED)], 2)
    return b.call(torch.ops.tokcc.retain_slots.default, rated, b.add_sizes(count, 1))


def merged_rows(cut: CacheCut, index: Any) -> Any:
    """Return how many of the kept entries ``[B, Hkv, K]`` may be joined, as a size: all of them, or one.

    In a generation nothing is merged; the others are then taken as they are. One is left, so that no size is zero.
    """
    b = cut.b
    count = b.size(index, 2)
    lost = b.min_sizes(b.sub_sizes(cut.total, count), b.sub_sizes(cut.new, 1))
    return b.add_sizes(b.mul_sizes(b.sub_sizes(count, 1), b.min_sizes(lost, 1)), 1)


def merge(cut: CacheCut, index: Any, source: Any, place: Any, weight: Any) -> ReducedCache:
    """Average entries that a text lost into kept ones, keys and values alike; single tokens just push entries out.

    Args:
        cut: The cut.
        index: int64 ``[B, Hkv, K]``: kept slots.
        source: int64 ``[B, Hkv, R]`` from :func:`evicted`.
        place: int64 ``[B, Hkv, R]``: which of the K each of them joins.
        weight: fp32 ``[B, Hkv, L]``, above 0 for kept slots; 0 for an evicted one that joins nothing.
    """
    b = cut.b
    take = torch.ops.tokcc.gather_slots.default
    count = merged_rows(cut, index)
    joined, others = b.slice(index, 2, 0, count), b.slice(index, 2, count, None)
    own = b.unsqueeze(b.call(take, weight, joined), 3)  # [B, Hkv, n, 1]
    mass = b.call(take, b.cat([weight, _column(cut, 0.0)], 2), source)
    mass = b.mul(mass, b.cast(cut.is_text(), torch.float32))  # [B, Hkv, R]
    here = b.compare("eq", b.unsqueeze(place, 2), b.unsqueeze(b.arange(count, cut.key), 1))  # [B, Hkv, n, R]
    shares = b.mul(b.cast(here, torch.float32), b.unsqueeze(mass, 2))
    total = b.add(own, b.sum(shares, 3, keepdim=True))
    stay, come = b.div(own, total), b.div(shares, total)
    there = in_cache(cut, source)
    results = []
    for x in (cut.key, cut.value):
        base, moved = (b.cast(b.call(take, x, slots), torch.float32) for slots in (joined, there))
        mean = b.add(b.mul(base, stay), b.matmul(come, moved))
        results.append(b.cat([b.cast(mean, b.dtype(x)), b.call(take, x, others)], 2))
    return ReducedCache(*results)


def in_cache(cut: CacheCut, source: Any) -> Any:
    """Replace the slot that is not there by one that is."""
    return cut.b.call(torch.ops.aten.minimum.default, source, cut.last_slot())


def _column(cut: CacheCut, number: float) -> Any:
    """Return fp32 ``[B, Hkv, 1]`` of one number, for the slot that is not there."""
    b = cut.b
    return b.full([b.size(cut.key, 0), cut.kv_heads, 1], number, torch.float32, cut.key)
