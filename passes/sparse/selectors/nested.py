"""Blocks that lie in good larger ones."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import HIDDEN, BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import best_of, first_of, most_of, ranked

__all__ = ["Nested"]

aten = torch.ops.aten


class Nested(SparseSelector):
    """The best blocks among those in the best larger blocks (MPCache, arXiv:2501.06807).

    Blocks of ``size`` times as many keys are rated by the step's score, too, and a share of them is kept; of the blocks
    in those the best are read, as many as the budget says. What must be read comes on top of that.

    Attributes:
        size: Blocks of a larger one.
        keep: Share of the larger ones, rounded up.
    """

    kind: ClassVar[str] = "nested"
    fills: ClassVar[bool] = True

    size: int = Field(default=2, ge=2)
    keep: float = Field(default=0.5, gt=0, le=1)

    @property
    def larger(self) -> tuple[int, ...]:
        """See :class:`SparseSelector`."""
        return (self.size,)

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        b = cut.b
        large, rating = cut.larger[self.size]
        most, own = most_of(large, Count("share", Fraction(str(self.keep))))
        rating = b.where(large.visible, large.shared(rating, self.share), HIDDEN)
        best = best_of(large, rating, most, own)  # [B, Hs, MQ, larger blocks]
        home = b.call(aten.floor_divide.default, b.arange(cut.blocks, cut.key), self.size)
        inside = b.logical_and(b.call(aten.index_select.default, best, 3, home), cut.visible)
        most, own = most_of(cut, budget)
        rating = b.where(inside, cut.shared(score, self.share), HIDDEN)
        chosen = best_of(cut, rating, most, own)
        # Own blocks are one more than the queries fill, which may begin anywhere.
        forced = self.sinks + self.local + 1 + -(-cut.block_q // cut.block_k)
        both = self.over(cut, b.where(chosen, rating, HIDDEN))
        return first_of(cut, *ranked(cut, both, b.min_sizes(b.add_sizes(most, forced), cut.blocks)), None)
