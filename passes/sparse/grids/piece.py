"""The kind of pieces that choose regions of a grid."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokcc.passes.piece import Piece
from tokcc.passes.sparse.cut import BlockList
from tokcc.passes.sparse.grids.cut import GridCut

__all__ = ["GridSelector"]


class GridSelector(Piece):
    """Chooses the regions of a grid that the patches of each region read.

    Attributes:
        across: S: the grid is cut into S x S regions.
        grid_rows: Rows of the grid; None = as the model lays its patches out, or a square one.
        scale: Factor of the logits: the ``model``'s own, or one over the root of the ``width`` of all heads together.
    """

    across: int = Field(default=7, ge=1)
    grid_rows: int | None = Field(default=None, ge=1)
    scale: Literal["model", "width"] = "model"

    def check(self, regions: int) -> None:
        """Refuse a number of regions.

        Raises:
            ValueError: Says what is needed.
        """

    def select(self, cut: GridCut) -> BlockList:
        """Return what is read, ``[B, 1 or H, M, K]``; tokens that are no patches are not among it."""
        raise NotImplementedError
