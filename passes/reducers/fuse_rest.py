"""Keep the selected tokens and fuse all others into one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import LOWEST, topk
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.drop import take

__all__ = ["FuseRest"]

aten = torch.ops.aten


class FuseRest(Reducer):
    """Append one token, the score-weighted sum of the dropped ones (EViT, arXiv:2202.07800, eq. 4).

    Attributes:
        normalise: Divide by the sum of the weights; the published form does not.
    """

    kind: ClassVar[str] = "fuse_rest"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    normalise: bool = False

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`FuseRest`."""
        b = cut.b
        if chosen.score is None or len(b.shape(chosen.index)) == 1:
            cut.ctx.fail("`fuse_rest` needs a selection by score", help="use `select: {kind: topk}` with a score")
        dtype = b.dtype(cut.x)
        ones = b.call(aten.ones_like.default, chosen.score)
        gone = ones if chosen.valid is None else b.cast(cut.valid, b.dtype(chosen.score))
        zeros = b.full([cut.batch.size, chosen.size], 0.0, b.dtype(chosen.score), cut.x)
        if chosen.valid is not None:
            # An empty slot keeps nothing: what it points at is fused like the rest.
            zeros = b.where(chosen.valid, 0.0, b.gather(gone, 1, chosen.index))
            zeros = b.cast(zeros, b.dtype(chosen.score))
        gone = b.scatter(gone, 1, chosen.index, zeros)  # [B, N]: 1 where dropped
        weights = b.mul(chosen.score, gone)
        if self.normalise:
            weights = b.div(weights, b.clamp_min(b.sum(weights, 1, keepdim=True), 1e-12))
        fused = b.matmul(b.unsqueeze(b.cast(weights, dtype), 1), cut.x)  # [B, 1, C]
        # In side tensors (masks, position bias) the fused token stands where the best dropped token stood.
        rating = b.where(b.compare("gt", gone, 0.5), b.cast(chosen.score, torch.float32), LOWEST)
        place = topk(b, rating, 1, in_order=False)  # [B, 1]
        child.size = b.add_sizes(chosen.size, 1)
        child.index = b.cat([chosen.index, place], 1)
        child.ascending = False
        if chosen.valid is not None:
            some = b.compare("gt", b.sum(gone, 1, keepdim=True), 0.5)
            child.valid = b.cat([chosen.valid, some], 1)
        child.base = cut.x
        child.suffix = 0
        if cut.space.weight is not None:
            kept = take(cut, cut.space.weight, chosen.index)
            rest = b.sum(b.mul(b.cast(cut.space.weight, b.dtype(chosen.score)), gone), 1, keepdim=True)
            child.weight, child.bias = b.cat([kept, b.cast(rest, b.dtype(kept))], 1), cut.space.bias
        return b.cat([take(cut, cut.x, chosen.index), fused], 1)
