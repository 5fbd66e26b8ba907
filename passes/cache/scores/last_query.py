"""Attention of the newest token."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["LastQuery"]


class LastQuery(CacheScore):
    """What the last query attends to, mean over all heads: one set per layer (TOVA, arXiv:2401.06104)."""

    kind: ClassVar[str] = "last_query"

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`LastQuery`."""
        b = cut.b
        row = b.sum(cut.probs(1), 3)  # [B, Hkv, G, L], of one query
        return b.mean(b.mean(row, 2), 1, keepdim=True)
