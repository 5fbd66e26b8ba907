"""Drop, and leave one token in each cell of the grid that stands for those dropped there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.grid import grid_of
from tokcc.passes.ordering import LOWEST, around, keep_counted, topk
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.drop import Drop

__all__ = ["RecycleCells"]


class RecycleCells(Reducer):
    """The dropped tokens of each cell become their mean, weighted by score (VFlowOpt, arXiv:2508.05211).

    It stands at the place of the best of them. To make room for these tokens, ``int(n / cell^2)`` of the n candidates
    more are dropped than the budget says, the lowest ones that are left. How many cells lose tokens depends on the
    input; slots of the others are empty and come last.

    Attributes:
        cell: Side of a cell in tokens, also a broken one: the cell of row r and column c is ``floor(r / cell)``,
            ``floor(c / cell)``.
        grid_rows: Rows of the grid; None = it is square.
    """

    kind: ClassVar[str] = "recycle_cells"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    cell: float = Field(default=12.0, ge=1.0)
    grid_rows: int | None = Field(default=None, ge=1)

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`RecycleCells`."""
        b = cut.b
        cells = self._cells(cut)  # [G, M]
        size, count = cells.shape[1], cells.shape[0]
        if chosen.score is None or chosen.valid is not None:
            cut.ctx.fail("tokens are recycled by a score, in samples that all keep the same number",
                         help="use `select: {kind: topk}` with a score")  # fmt: skip
        kept = b.sub_sizes(chosen.size, cut.first + cut.last) - int(size / self.cell**2)
        if kept < 1:
            cut.ctx.fail(
                f"the recycled tokens of {count} cells leave no room for others",
                help="keep more tokens, or use larger cells",
            )
        score = cut.inner(b.cast(chosen.score, torch.float32))  # [B, M]
        ones = b.full([cut.batch.size, kept], 1.0, torch.float32, cut.x)
        none = b.full([cut.batch.size, size], 0.0, torch.float32, cut.x)
        stays = b.scatter(none, 1, topk(b, score, kept, in_order=False), ones)
        gone = b.add(b.mul(stays, -1.0), 1.0)  # [B, M]
        member = b.mul(b.constant("recycle_cells", cells), b.unsqueeze(gone, 1))  # [B, G, M]
        used = b.amax(member, 2, keepdim=True)  # [B, G, 1]: 1 where a cell loses tokens
        best = b.argmax(b.where(b.compare("gt", member, 0.5), b.unsqueeze(score, 1), LOWEST), 2, keepdim=True)
        host = b.cast(b.compare("eq", best, b.arange(size, cut.x)), torch.float32)
        host = b.mul(host, used)  # [B, G, M]
        hosts = b.amax(host, 1)  # [B, M]
        changed = replace(cut, x=self._with_means(cut, b.mul(member, b.unsqueeze(score, 1)), host, hosts))
        room = min(count, size - kept)
        own = b.add(b.cast(b.squeeze(b.sum(used, 1), 1), torch.int64), kept)
        marked = keep_counted(cut, around(cut, b.add(stays, hosts)), kept + room, own, chosen.score)
        return Drop().reduce(changed, marked, child)

    def _cells(self, cut: Cut) -> torch.Tensor:
        """Return which cell each candidate is in, fp32 ``[G, M]``."""
        height, width = grid_of(cut, self.grid_rows)
        across = math.ceil(width / self.cell)
        own = [int(r // self.cell) * across + int(c // self.cell) for r in range(height) for c in range(width)]
        cells = torch.zeros(math.ceil(height / self.cell) * across, height * width)
        cells[own, range(height * width)] = 1.0
        return cells

    def _with_means(self, cut: Cut, weight: Any, host: Any, hosts: Any) -> Any:
        """Return the stream with the mean of each cell at its host.

        Args:
            cut: The cut.
            weight: fp32 ``[B, G, M]``: of the dropped tokens of each cell.
            host: fp32 ``[B, G, M]``: 1 where a cell's new token stands.
            hosts: fp32 ``[B, M]``: the same of any cell.
        """
        b = cut.b
        total = b.sum(weight, 2, keepdim=True)
        total = b.where(b.compare("gt", b.mul(total, total), 1e-24), total, 1.0)
        mean = b.matmul(b.div(weight, total), b.cast(cut.inner(cut.x), torch.float32))  # [B, G, C]
        new = b.cast(b.matmul(b.transpose(host, 1, 2), mean), b.dtype(cut.x))  # [B, M, C]
        inner = b.where(b.unsqueeze(b.compare("gt", hosts, 0.5), 2), new, cut.inner(cut.x))
        return cut.with_protected_values(inner)
