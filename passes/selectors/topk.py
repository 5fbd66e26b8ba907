"""The best-scored tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import keep_indices, masked
from tokcc.passes.piece import Selector

__all__ = ["TopK"]


class TopK(Selector):
    """Keep the K candidates with the largest score.

    Attributes:
        order: Of the output: that of the ``sequence``, or by falling ``score``.
    """

    kind: ClassVar[str] = "topk"

    order: Literal["sequence", "score"] = "sequence"

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`TopK`."""
        kept = cut.count.kept(cut.b, cut.candidates, cut.initial_candidates)
        rating = masked(cut, score)
        return keep_indices(cut, rating, kept, score_for_reducer=score, in_order=self.order == "sequence")
