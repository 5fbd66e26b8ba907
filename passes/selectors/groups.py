"""Fixed groups of neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cut import Cut, Grouped
from tokcc.passes.piece import Selector

__all__ = ["Groups"]


class Groups(Selector):
    """Groups of s neighbours for a budget of one token in s: ``K = floor(N / s)``; an incomplete last group goes."""

    kind: ClassVar[str] = "groups"
    wants_score: ClassVar[bool] = False

    def select(self, cut: Cut, score: Any) -> Grouped:
        """See :class:`Groups`."""
        del score
        if cut.first or cut.last:
            cut.ctx.fail("groups of neighbours cannot protect tokens", help="set `protect: {first: 0}`")
        if cut.count.kind != "share" or cut.count.amount.numerator != 1 or cut.count.of_initial:
            cut.ctx.fail("the budget does not say how many neighbours make a group", help="use `budget: {stride: S}`")
        width = cut.count.amount.denominator
        size = cut.b.floordiv_sizes(cut.tokens, width)
        if isinstance(size, int) and size == 0:
            cut.ctx.fail(f"{cut.tokens} tokens do not fill one group of {width}", help="use a smaller `stride`")
        return Grouped(width, size)
