"""Cells of a grid, one for each new token."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.cut import Cut, Gridded
from tokcc.passes.grid import grid_of
from tokcc.passes.piece import Selector

__all__ = ["Cells"]


class Cells(Selector):
    """The candidates are a grid, which becomes a coarser grid of as many tokens as the budget asks for.

    Attributes:
        grid_rows: Rows of the grid; None = it is square.
        rows: Rows of the coarser grid; None = the number that keeps the grid's shape best, the lower one of two.
    """

    kind: ClassVar[str] = "cells"
    wants_score: ClassVar[bool] = False

    grid_rows: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)

    def select(self, cut: Cut, score: Any) -> Gridded:
        """See :class:`Cells`."""
        del score
        b = cut.b
        grid = height, width = grid_of(cut, self.grid_rows)
        kept: int = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        fitting = [n for n in range(1, height + 1) if kept % n == 0 and kept // n <= width and self.rows in (None, n)]
        if not fitting:
            cut.ctx.fail(
                f"a grid of {height} x {width} tokens cannot become one of {kept}"
                + ("" if self.rows is None else f" in {self.rows} rows"),
                needed="a number of tokens that is rows times columns, none of them more than there are",
                help="change the budget" + ("" if self.rows is None else " or the parameter `rows`"),
            )
        rows = min(fitting, key=lambda n: abs(math.log(n * n * width / (kept * height))))
        return Gridded(grid, (rows, kept // rows), b.add_sizes(kept, cut.first + cut.last))
