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
        even: Around a class token that stands between the candidates keep as many in front as behind, so one less where
            the budget is odd.
    """

    kind: ClassVar[str] = "topk"
    around_middle: ClassVar[bool] = True

    order: Literal["sequence", "score"] = "sequence"
    even: bool = False

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`TopK`."""
        kept = cut.count.kept(cut.b, cut.candidates, cut.initial_candidates)
        if self.even and cut.middle is not None:
            kept = cut.b.max_sizes(
                cut.b.mul_sizes(cut.b.floordiv_sizes(kept, 2), 2), cut.b.min_sizes(2, cut.candidates)
            )
        rating = masked(cut, score)
        return keep_indices(cut, rating, kept, score_for_reducer=score, in_order=self.order == "sequence")
