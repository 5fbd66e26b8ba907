"""As many blocks for every row."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import first_of, most_of, ranked

__all__ = ["BestBlocks"]


class BestBlocks(SparseSelector):
    """The best blocks by rating, those that must be read among them; of equal ratings the earlier one."""

    kind: ClassVar[str] = "best"
    fills: ClassVar[bool] = True

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        most, own = most_of(cut, budget)
        return first_of(cut, *ranked(cut, self.rated(cut, score), most), own)
