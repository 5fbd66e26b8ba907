"""Candidates as an image: rows of tokens, and windows of them."""

from __future__ import annotations

import math
from typing import Any

from tokcc.passes.cut import Cut

__all__ = ["grid_of", "windows"]


def grid_of(cut: Cut, rows: int | None, *, parameter: str = "grid_rows") -> tuple[int, int]:
    """Return the rows and columns of the grid that the candidates are.

    Args:
        cut: The cut.
        rows: Rows of the grid; None = it is square.
        parameter: What the policy calls them.

    Raises:
        AxisError: The candidates are no such grid, or their number depends on the input.
    """
    size = cut.candidates
    if cut.valid is not None or not isinstance(size, int):
        cut.ctx.fail("the tokens are no grid of fixed size",
                     help="export the model with a fixed number of tokens and without a padding mask")  # fmt: skip
    height = math.isqrt(size) if rows is None else rows
    if size % height or (rows is None and height * height != size):
        cut.ctx.fail(
            f"{size} tokens are no grid" + (" of equal sides" if rows is None else f" of {rows} rows"),
            needed=f"the number of rows of the grid, as the parameter `{parameter}`; no class token among the patches",
            help=f"set the parameter `{parameter}`",
        )
    return height, size // height


def windows(cut: Cut, x: Any, grid: tuple[int, int], into: tuple[int, int]) -> Any:
    """Put the tokens of each window beside each other: ``[B, H W, C]`` -> ``[B, n m, (H / n) (W / m), C]``.

    Args:
        cut: The cut.
        x: Tokens of a grid, row by row.
        grid: H and W.
        into: n and m, which divide them; the windows come row by row, and so do the tokens of each.
    """
    b = cut.b
    (height, width), (rows, columns) = grid, into
    tall, wide, channels = height // rows, width // columns, b.shape(x)[2]
    cells = b.reshape(x, [cut.batch.size, rows, tall, columns, wide, channels])
    return b.reshape(b.permute(cells, [0, 1, 3, 2, 4, 5]), [cut.batch.size, rows * columns, tall * wide, channels])
