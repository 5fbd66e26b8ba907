"""Evenly strided tokens, and the best-scored of the others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import HIGHEST, LOWEST, around, keep_indices, topk
from tokcc.passes.piece import Selector

__all__ = ["StridedAndBest"]

aten = torch.ops.aten


class StridedAndBest(Selector):
    """Keep every s-th candidate and fill the budget by score (LLaVA-PruMerge+, arXiv:2403.15388).

    The published union of the best and the strided tokens has as many tokens as they do not have in common; here the
    number is fixed, so the next best take the place of what is common. The order is the published one: by falling
    score down to the last token that its score has brought in, then the strided ones below it in sequence order.

    Attributes:
        stride: s; the positions are those of ``range(0, n - 1, s)``.
    """

    kind: ClassVar[str] = "strided_and_best"

    stride: int = Field(default=6, ge=1)

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`StridedAndBest`."""
        b, size = cut.b, cut.candidates
        kept = cut.count.kept(b, size, cut.initial_candidates)
        if cut.valid is not None or not isinstance(size, int) or not isinstance(kept, int):
            cut.ctx.fail(
                "the number of strided tokens is not fixed here",
                help="export the model with a fixed number of tokens and without a padding mask",
            )
        strided = len(range(0, size - 1, self.stride))
        if strided > kept:
            cut.ctx.fail(
                f"{strided} of {size} tokens stand {self.stride} apart, and {kept} are to be kept",
                help="use a larger `stride`, or a larger budget",
            )
        rating = cut.inner(b.cast(score, torch.float32))  # [B, M]
        place = b.arange(size, cut.x)
        on_grid = b.compare("eq", b.call(aten.remainder.Scalar, place, self.stride), 0)
        on_grid = b.unsqueeze(b.logical_and(on_grid, b.compare("lt", place, size - 1)), 0)  # [1, M]
        priority = b.where(on_grid, HIGHEST, rating)
        first = topk(b, priority, kept, in_order=False)  # [B, K]: the grid, then the others by falling score
        # What is not below the worst that its score brought in stands there for its score, on the grid or not.
        last = b.add(b.amax(rating, 1, keepdim=True), 1.0)
        if kept > strided:
            last = b.gather(rating, 1, b.slice(first, 1, kept - 1, kept))  # [B, 1]
        floor = b.sub(b.amin(rating, 1, keepdim=True), 1.0)
        behind = b.where(on_grid, b.sub(floor, b.cast(place, torch.float32)), LOWEST)
        key = b.where(b.compare("ge", rating, last), rating, behind)
        return keep_indices(cut, around(cut, key), kept, score_for_reducer=score, in_order=False)
