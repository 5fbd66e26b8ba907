"""Candidates as an image: rows of tokens, and windows of them."""

from __future__ import annotations

import math
from typing import Any

from tokcc.passes.cut import Cut

__all__ = ["fixed_size", "grid_of", "side_of", "windows"]


def fixed_size(cut: Cut) -> int:
    """Return the number of candidates.

    Raises:
        AxisError: It depends on the input.
    """
    if cut.valid is not None or not isinstance(cut.candidates, int):
        cut.ctx.fail("the tokens are no grid of fixed size",
                     help="export the model with a fixed number of tokens and without a padding mask")  # fmt: skip
    return cut.candidates


def side_of(cut: Cut, side: int | None, *, parameter: str, given: str, needed: str) -> int:
    """Return one side of the grid that the candidates are.

    Args:
        cut: The cut.
        side: As the policy gives it; None = the grid is square.
        parameter: What the policy calls it.
        given: What a grid of such a side is called.
        needed: What it should be.

    Raises:
        AxisError: The candidates are no such grid, or their number depends on the input.
    """
    size = fixed_size(cut)
    found = side or math.isqrt(size)
    if size % found or (side is None and found * found != size):
        cut.ctx.fail(
            f"{size} tokens are no grid {'of equal sides' if side is None else given}",
            needed=needed,
            help=f"set the parameter `{parameter}`",
        )
    return found


def grid_of(cut: Cut, rows: int | None) -> tuple[int, int]:
    """Return the rows and columns of the grid that the candidates are.

    Args:
        cut: The cut.
        rows: Rows of the grid, the parameter `grid_rows`; None = it is square.

    Raises:
        AxisError: The candidates are no such grid, or their number depends on the input.
    """
    needed = "the number of rows of the grid, as the parameter `grid_rows`; no class token among the patches"
    height = side_of(cut, rows, parameter="grid_rows", given=f"of {rows} rows", needed=needed)
    return height, fixed_size(cut) // height


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
