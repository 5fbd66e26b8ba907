"""Average the cells of a grid."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cells import cells_of
from tokcc.passes.cut import Cut, Gridded
from tokcc.passes.piece import Reducer

__all__ = ["AdaptivePool", "averaging"]


class AdaptivePool(Reducer):
    """Adaptive average pooling: cell i of n covers the rows ``floor(i h / n) .. ceil((i + 1) h / n)`` of h.

    Cells overlap where n does not divide h. A constant matrix of averages is applied on both axes of the grid.
    """

    kind: ClassVar[str] = "adaptive_pool"
    takes: ClassVar[tuple[type, ...]] = (Gridded,)

    def reduce(self, cut: Cut, chosen: Gridded, child: TokenSpace) -> Any:
        """See :class:`AdaptivePool`."""
        b = cut.b
        cells_of(cut, chosen, child)
        x = cut.inner(cut.x)
        (height, width), (rows, columns), channels = chosen.grid, chosen.cells, b.shape(x)[2]
        down, along = (
            b.cast(b.constant("adaptive_pool", averaging(into, of)), b.dtype(x))
            for into, of in ((rows, height), (columns, width))
        )
        x = b.matmul(along, b.reshape(x, [cut.batch.size, height, width, channels]))  # [B, h, m, C]
        x = b.matmul(down, b.reshape(x, [cut.batch.size, height, columns * channels]))  # [B, n, m C]
        return cut.with_protected_values(b.reshape(x, [cut.batch.size, rows * columns, channels]))


def averaging(into: int, of: int) -> torch.Tensor:
    """Return the matrix of averages, fp32 ``[into, of]``; its rows sum to one."""
    matrix = torch.zeros(into, of)
    for cell in range(into):
        start, stop = cell * of // into, -(-(cell + 1) * of // into)
        matrix[cell, start:stop] = 1.0 / (stop - start)
    return matrix
