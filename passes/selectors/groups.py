"""Fixed groups of neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.cut import Cut, Grouped
from tokcc.passes.piece import Selector

__all__ = ["Groups"]


class Groups(Selector):
    """Groups of ``width`` neighbours: ``K = floor(N / width)``, an incomplete last group is dropped.

    Attributes:
        width: Tokens in a group.
    """

    kind: ClassVar[str] = "groups"
    wants_score: ClassVar[bool] = False

    width: int = Field(default=2, ge=1)

    def select(self, cut: Cut, score: Any) -> Grouped:
        """See :class:`Groups`."""
        del score
        if cut.first or cut.last:
            cut.ctx.fail("groups of neighbours cannot protect tokens", help="set `protect: {first: 0}`")
        return Grouped(self.width, cut.b.floordiv_sizes(cut.tokens, self.width))
