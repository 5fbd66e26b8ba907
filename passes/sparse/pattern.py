"""Selectors that know themselves how much is read: they say yes or no to every block."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import table_list

__all__ = ["SparsePattern"]


class SparsePattern(SparseSelector):
    """Chooses blocks without a rating by the step's score, and without its budget."""

    wants_score: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False

    def table(self, cut: SparseCut) -> Any:
        """Return bool ``[B or 1, H or 1, MQ or 1, M]``: what is read beside what must be.

        Blocks that a row does not see need not be left out.
        """
        raise NotImplementedError

    def whole_table(self, cut: SparseCut) -> Any:
        """Return bool ``[B, Hs, MQ, M]``: all that is read."""
        b = cut.b
        return b.logical_or(b.logical_and(self.table(cut), cut.visible), self.forced(cut))

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        del score, budget
        return table_list(cut, self.whole_table(cut))
