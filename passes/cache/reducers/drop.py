"""Evict what was not kept."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.cache.piece import CacheReducer, ReducedCache

__all__ = ["Evict"]


class Evict(CacheReducer):
    """Keep the chosen entries as they are."""

    kind: ClassVar[str] = "drop"

    def reduce(self, cut: CacheCut, retained: Retained) -> ReducedCache:
        """See :class:`Evict`."""
        op = torch.ops.tokcc.gather_slots.default
        return ReducedCache(*(cut.b.call(op, x, retained.index) for x in (cut.key, cut.value)))
