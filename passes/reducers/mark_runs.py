"""Drop, and leave a mark where a run of tokens is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import around, keep_counted
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.drop import Drop
from tokcc.passes.trained import TensorSpec, Trained

__all__ = ["MarkRuns"]

aten = torch.ops.aten


class MarkRuns(Trained, Reducer):
    """Every run of dropped tokens that follow each other becomes one token with a learned vector (FocusUI's PosPad).

    It stands at the place of the run's last token, in masks and position tables too. How many runs there are depends on
    the input, at most ``min(M - K, K + 1)`` of M candidates of which K are kept; slots without one are empty and come
    last. Tensor: ``marker`` ``[C]``.

    Attributes:
        most: Slots for runs; the first ones of an image with more get theirs, the others none. None = room for all.
    """

    kind: ClassVar[str] = "mark_runs"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    most: int | None = Field(default=None, ge=0)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`MarkRuns`."""
        del sizes
        return (TensorSpec("marker", ("C",)),)

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`MarkRuns`."""
        b = cut.b
        if chosen.valid is not None:
            cut.ctx.fail("runs are marked where every sample keeps the same number of tokens",
                         help="use a model without a padding mask")  # fmt: skip
        size, kept = cut.candidates, b.sub_sizes(chosen.size, cut.first + cut.last)
        index = chosen.index if len(b.shape(chosen.index)) == 2 else cut.per_sample(chosen.index)
        none = b.full([cut.batch.size, cut.tokens], 0.0, torch.float32, cut.x)
        stays = cut.inner(b.scatter(none, 1, index, b.full([cut.batch.size, chosen.size], 1.0, torch.float32, cut.x)))
        gone = b.mul(b.sub(stays, 1.0), -1.0)  # [B, M]
        # A run ends where a dropped token is followed by a kept one, or by nothing.
        next_ = b.cat([b.slice(stays, 1, 1), b.full([cut.batch.size, 1], 1.0, torch.float32, cut.x)], 1)
        end = b.mul(gone, next_)
        room = b.min_sizes(b.sub_sizes(size, kept), b.add_sizes(kept, 1))
        if self.most is not None:
            room = b.min_sizes(room, self.most)
            end = b.mul(end, b.cast(b.compare("le", b.call(aten.cumsum.default, end, 1), self.most), torch.float32))
        runs = b.cast(b.sum(end, 1), torch.int64)  # [B]
        marked = keep_counted(
            cut, around(cut, b.add(stays, end)), b.add_sizes(kept, room), b.add(runs, kept), chosen.score
        )
        reduced = Drop().reduce(cut, marked, child)
        marks = b.compare("gt", b.gather(around(cut, end), 1, marked.index), 0.5)  # [B, K + G]
        marker = b.cast(self.tensor(b, "marker"), b.dtype(cut.x))
        return b.where(b.unsqueeze(marks, 2), marker, reduced)
