"""Every block that is rated high enough."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import first_of, most_of, ranked

__all__ = ["Threshold"]

aten = torch.ops.aten


class Threshold(SparseSelector):
    """The blocks whose rating is above a number, and those that must be read; the budget is the most of them.

    Attributes:
        above: The number.
    """

    kind: ClassVar[str] = "threshold"

    above: float

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        b = cut.b
        most, own = most_of(cut, budget)
        values, places = ranked(cut, self.rated(cut, score), most)
        wanted = b.sum(b.cast(b.compare("gt", values, self.above), torch.int64), 3, keepdim=True)
        return first_of(cut, values, places, wanted if own is None else b.call(aten.minimum.default, wanted, own))
