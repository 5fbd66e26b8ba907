"""The regions that are most like each region."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.sparse.cut import BlockList
from tokcc.passes.sparse.grids.cut import GridCut
from tokcc.passes.sparse.grids.piece import GridSelector

__all__ = ["Regions"]

aten = torch.ops.aten


class Regions(GridSelector):
    """The regions whose mean key has the largest product with a region's mean query, for all heads together.

    A region is not among its own unless it is among the best (BiFormer, arXiv:2303.08810, eq. 3 to 5).

    Attributes:
        k: How many a region reads.
    """

    kind: ClassVar[str] = "regions"

    k: int = Field(default=16, ge=1)

    def check(self, regions: int) -> None:
        """See :class:`GridSelector`."""
        if self.k > regions:
            raise ValueError(f"`k` of at most {regions}, the number of regions, not {self.k}")

    def select(self, cut: GridCut) -> BlockList:
        """See :class:`GridSelector`."""
        b = cut.b
        # Their factor is left out: it is the same for all, and the order is what counts.
        rating = b.matmul(cut.query_means, b.transpose(cut.key_means, 1, 2))  # [B, M, M]
        _, best = b.parts(b.call(aten.topk.default, rating, self.k, -1, True, True), 2)
        count: Any = b.full([cut.batch, 1, cut.regions], self.k, torch.int64, rating)
        return BlockList(b.unsqueeze(best, 1), count)
