"""The best entries, next to protected ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import LOWEST, PROTECTED, CacheCut, Retained
from tokcc.passes.cache.piece import CacheSelector

__all__ = ["Best"]


class Best(CacheSelector):
    """Keep sinks, recent entries and the best others, in the order of the sequence; ties to the older entry.

    Padding goes first. As many entries as the capacity stay, whatever is protected.
    """

    kind: ClassVar[str] = "best"

    def select(self, cut: CacheCut, score: Any) -> Retained:
        """See :class:`Best`."""
        b = cut.b
        rating = b.cast(score, torch.float32)
        protected = cut.protected()
        if protected is not None:
            rating = b.where(protected, PROTECTED, rating)
        rating = b.where(b.unsqueeze(cut.real, 1), rating, LOWEST)
        rating = b.expand(rating, [-1, cut.kv_heads, -1])
        return Retained(b.call(torch.ops.tokcc.retain_slots.default, rating, cut.capacity))
