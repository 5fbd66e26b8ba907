"""The best entries, with what made them the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.cache.selectors.best import Best

__all__ = ["Rated", "RatedBest"]


@dataclass(frozen=True)
class Rated(Retained):
    """A selection that remembers the score of every entry.

    Attributes:
        score: fp32 ``[B, Hkv, L]``.
    """

    score: Any = None


class RatedBest(Best):
    """Keep the best entries as `best` does, and hand their scores on to a reducer that weighs by them."""

    kind: ClassVar[str] = "rated_best"

    def select(self, cut: CacheCut, score: Any) -> Retained:
        """See :class:`RatedBest`."""
        b = cut.b
        rating = b.expand(b.cast(score, torch.float32), [-1, cut.kv_heads, -1])
        return Rated(super().select(cut, score).index, score=rating)
