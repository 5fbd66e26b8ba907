"""Merge the best evicted entries into kept ones that they resemble."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.errors import PlanError
from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import LOWEST, CacheCut, Retained
from tokcc.passes.cache.merging import evicted, in_cache, kept_mask, merge, merged_rows, receivers
from tokcc.passes.cache.piece import CacheReducer, ReducedCache
from tokcc.passes.cache.selectors.rated import Rated

__all__ = ["ZeroClass"]

_TINY = 1e-12


class ZeroClass(CacheReducer):
    """Merge near-duplicates, discard the rest (EMS, arXiv:2412.08521, details ours).

    Kept entries are the centers; the next best entries, so that there are ``candidates`` times as many in all, each
    look for the center whose key points most like theirs. Before the centers stands a class of nothing at the cosine
    ``threshold``: who is not above it is discarded. Keys and values become means weighted by the score, the center
    included. Protected entries receive nothing.

    Attributes:
        candidates: Centers and candidates together, as a multiple of the centers.
        threshold: Cosine of the class of nothing; above 1 nothing is merged.
    """

    kind: ClassVar[str] = "zero_class"
    changes: ClassVar[bool] = True

    candidates: int = Field(default=3, ge=1)
    threshold: float = Field(default=0.6, ge=-1, allow_inf_nan=False)

    def reduce(self, cut: CacheCut, retained: Retained) -> ReducedCache:
        """See :class:`ZeroClass`."""
        if not isinstance(retained, Rated):
            raise PlanError(
                "the reducer `zero_class` weighs by scores, which the selector does not hand on",
                needed="`select: {kind: rated_best}`",
                help="use that selector, or `reduce: {kind: drop}`",
            )
        b, index = cut.b, retained.index
        count = b.size(index, 2)
        kept = kept_mask(cut, index)
        real = b.unsqueeze(cut.real, 1)
        # Padding that fills up a row keeps what it holds.
        weight = b.where(real, b.clamp_min(retained.score, _TINY), 1.0)
        more = b.sub_sizes(b.min_sizes(b.mul_sizes(count, self.candidates), cut.total), count)
        source = evicted(cut, kept, b.where(real, retained.score, LOWEST), more)  # [B, Hkv, R]
        center, close = self._nearest(cut, index, kept, source)
        joins = self._marked(cut, source, close)
        weight = b.mul(weight, b.cast(b.logical_or(kept, b.logical_and(joins, real)), torch.float32))
        return merge(cut, index, source, center, weight)

    def _nearest(self, cut: CacheCut, index: Any, kept: Any, source: Any) -> tuple[Any, Any]:
        """Return the center of each candidate, int64 ``[B, Hkv, R]``, and whether it is close enough."""
        b = cut.b
        take = torch.ops.tokcc.gather_slots.default
        centers = b.slice(index, 2, 0, merged_rows(cut, index))
        there = _unit(b, b.call(take, cut.key, in_cache(cut, source)))  # [B, Hkv, R, D]
        likeness = b.matmul(there, b.transpose(_unit(b, b.call(take, cut.key, centers)), 2, 3))  # [B, Hkv, R, K]
        free = b.call(take, receivers(cut, kept), centers)  # [B, Hkv, K]
        likeness = b.where(b.unsqueeze(free, 2), likeness, -2.0)
        shape = [b.size(cut.key, 0), cut.kv_heads, b.size(source, 2), 1]
        nothing = b.full(shape, self.threshold, torch.float32, cut.key)
        choice = b.argmax(b.cat([nothing, likeness], 3), 3)
        return b.clamp_min(b.sub(choice, 1), 0), b.compare("gt", choice, 0)

    def _marked(self, cut: CacheCut, source: Any, close: Any) -> Any:
        """Return bool ``[B, Hkv, L]``: candidates that join a center."""
        b = cut.b
        longer = b.add_sizes(cut.total, 1)
        nothing = b.full([b.size(cut.key, 0), cut.kv_heads, longer], 0, torch.int64, cut.key)
        marks = b.scatter(nothing, 2, source, b.cast(close, torch.int64))
        return b.compare("gt", b.slice(marks, 2, 0, cut.total), 0)


def _unit(b: Builder, x: Any) -> Any:
    """Scale the last axis to length one, in fp32."""
    x = b.cast(x, torch.float32)
    return b.div(x, b.clamp_min(b.sqrt(b.sum(b.mul(x, x), 3, keepdim=True)), _TINY))
