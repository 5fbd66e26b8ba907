"""What reducers share that make one token of each cell of a grid."""

from __future__ import annotations

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Gridded

__all__ = ["cells_of"]


def cells_of(cut: Cut, chosen: Gridded, child: TokenSpace) -> None:
    """Fill in the maps of the space of cells: each stands where its middle token stood, and is given back to its own.

    Where cells overlap, a token belongs to the cell ``floor(i n / h)``.
    """
    b, first = cut.b, cut.first
    (height, width), (rows, columns) = chosen.grid, chosen.cells
    middle = [
        (2 * row + 1) * height // (2 * rows) * width + (2 * column + 1) * width // (2 * columns)
        for row in range(rows)
        for column in range(columns)
    ]
    own = [
        row * rows // height * columns + column * columns // width for row in range(height) for column in range(width)
    ]
    child.size = chosen.size
    child.index = cut.with_protected(cut.per_sample(b.constant("cell_middle", torch.tensor(middle))))
    parts = [torch.arange(first), torch.tensor(own) + first, torch.arange(cut.last) + first + rows * columns]
    child.assign = cut.per_sample(b.constant("cell_of", torch.cat(parts)))
