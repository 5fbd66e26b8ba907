"""As many blocks for every row, by a rating of its own."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.pattern import SparsePattern
from tokcc.passes.sparse.piece import OtherSparseScore
from tokcc.passes.sparse.ranking import best_of

__all__ = ["BestRated"]


class BestRated(SparsePattern):
    """The best blocks of every row, as a pattern of some heads (MInference's block-sparse heads).

    Attributes:
        score: What rates.
        blocks: How many a row reads, those that must be read among them.
    """

    kind: ClassVar[str] = "best_rated"

    score: OtherSparseScore
    blocks: int = Field(default=100, ge=1)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseSelector`."""
        self.score.check(block_q, block_k)

    def table(self, cut: SparseCut) -> Any:
        """See :class:`SparsePattern`."""
        rating = self.rated(cut, self.score.emit(cut))
        return best_of(cut, rating, cut.b.min_sizes(self.blocks, cut.blocks))
