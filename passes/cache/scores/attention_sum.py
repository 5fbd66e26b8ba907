"""Accumulated attention."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["AttentionSum"]


class AttentionSum(CacheScore):
    """The attention that an entry received from all queries so far, mean over its group (H2O, arXiv:2306.14048)."""

    kind: ClassVar[str] = "attention_sum"
    states: ClassVar[tuple[str, ...]] = ("key_score",)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`AttentionSum`."""
        b = cut.b
        before = cut.states["key_score"]  # [B, Hkv, P]
        fresh = b.slice(cut.received, 2, cut.past, None)
        known = b.add(before, b.slice(cut.received, 2, 0, cut.past))
        total = b.cat([known, fresh], 2)
        cut.left["key_score"] = total
        return total
