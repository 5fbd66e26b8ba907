"""The best-scored tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import keep_indices, masked
from tokcc.passes.piece import Selector

__all__ = ["TopK"]


class TopK(Selector):
    """Keep the K candidates with the largest score, in sequence order."""

    kind: ClassVar[str] = "topk"

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`TopK`."""
        kept = cut.count.kept(cut.b, cut.candidates, cut.initial_candidates)
        return keep_indices(cut, masked(cut, score), kept, score_for_reducer=score)
