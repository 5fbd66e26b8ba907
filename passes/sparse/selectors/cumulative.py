"""As many blocks as make up a share of a row's mass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import first_of, most_of, ranked

__all__ = ["Cumulative"]

aten = torch.ops.aten


class Cumulative(SparseSelector):
    """The best blocks until their ratings reach ``mass`` of the row's sum; the one that crosses it is read.

    What must be read counts first (XAttention, arXiv:2503.16428). The budget is the most that a row reads. Ratings are
    not negative.

    Attributes:
        mass: The share.
    """

    kind: ClassVar[str] = "cumulative"

    mass: float = Field(default=0.9, gt=0, le=1)

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        b = cut.b
        shared = cut.shared(score, self.share)
        most, own = most_of(cut, budget)
        values, places = ranked(cut, self.rated(cut, score), most)
        mass = b.call(aten.gather.default, b.expand(shared, self._shape(cut, values, shared)), 3, places)
        seen = b.cast(b.compare("gt", values, 0), torch.float32)
        mass = b.mul(mass, seen)
        before = b.sub(b.call(aten.cumsum.default, mass, 3), mass)  # what those in front of it have
        whole = b.sum(b.where(cut.visible, shared, 0.0), 3, keepdim=True)
        must = b.sum(b.cast(b.logical_and(self.forced(cut), cut.visible), torch.int64), 3, keepdim=True)
        short = b.cast(b.compare("lt", before, b.mul(whole, self.mass)), torch.int64)
        # The order is by rating: the blocks that are wanted are the first ones.
        wanted = b.call(aten.maximum.default, b.sum(short, 3, keepdim=True), must)
        return first_of(cut, values, places, wanted if own is None else b.call(aten.minimum.default, wanted, own))

    @staticmethod
    def _shape(cut: SparseCut, values: Any, shared: Any) -> list[Any]:
        b = cut.b
        return [*(b.size(values, axis) for axis in range(3)), b.size(shared, 3)]
