"""Add its nearest neighbours to each kept token, and fuse what was dropped."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.fuse_rest import FuseRest

__all__ = ["KnnAdd"]


class KnnAdd(Reducer):
    """``y_i = x_i + sum_j w_j x_j`` over the k nearest neighbours j of i (LLaVA-PruMerge, arXiv:2403.15388).

    Neighbours may be kept or not. The weights are the selection's scores, not normalised. One more token is the
    weighted sum of the dropped ones, as the reducer `fuse_rest` makes it. Protected tokens stay as they are and are
    nobody's neighbours.

    Attributes:
        neighbours: k.
        of: Vectors that nearness (cosine, over all heads) is measured on.
    """

    kind: ClassVar[str] = "knn_add"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    neighbours: int = Field(default=32, ge=1)
    of: FeatureKind = "keys"

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`KnnAdd`."""
        b = cut.b
        if cut.last or chosen.valid is not None or cut.valid is not None:
            cut.ctx.fail("neighbours are not counted in padded batches", help="use a model without a padding mask")
        fused = FuseRest().reduce(cut, chosen, child)  # [B, K + 1, C], nothing but K where nothing is dropped
        own = b.slice(chosen.index, 1, cut.first)  # [B, K']
        added = b.cast(self._sums(cut, b.sub(own, cut.first) if cut.first else own, chosen.score), b.dtype(cut.x))
        kept = b.size(own, 1)
        stop = b.add_sizes(kept, cut.first)
        parts = [b.add(b.slice(fused, 1, cut.first, stop), added), b.slice(fused, 1, stop)]
        return b.cat([b.slice(fused, 1, 0, cut.first), *parts] if cut.first else parts, 1)

    def _sums(self, cut: Cut, own: Any, score: Any) -> Any:
        """Return the weighted sums over the neighbours of candidates ``own`` ``[B, K]``, fp32 ``[B, K, C]``."""
        b, size = cut.b, cut.candidates
        metric = cut.inner(features(cut, self.of, "concat"))  # [B, M, D]
        rows = b.call(torch.ops.tokcc.gather_tokens.default, metric, own, 1, 0)
        cosine = b.matmul(rows, b.transpose(metric, 1, 2))  # [B, K, M]
        itself = b.compare("eq", b.unsqueeze(own, 2), b.arange(size, cut.x))
        cosine = b.where(itself, -2.0, cosine)
        count = b.min_sizes(self.neighbours, b.sub_sizes(size, 1))
        kept = b.size(own, 1)
        flat = b.reshape(cosine, [b.mul_sizes(cut.batch.size, kept), size])
        nearest = b.call(torch.ops.tokcc.topk_select.default, flat, count, False)  # [B K, k]
        zeros = b.full([b.mul_sizes(cut.batch.size, kept), size], 0.0, torch.float32, cut.x)
        ones = b.full([b.mul_sizes(cut.batch.size, kept), count], 1.0, torch.float32, cut.x)
        chosen = b.reshape(b.scatter(zeros, 1, nearest, ones), [cut.batch.size, kept, size])
        weights = b.mul(chosen, b.unsqueeze(cut.inner(b.cast(score, torch.float32)), 1))
        return b.matmul(weights, cut.inner(b.cast(cut.x, torch.float32)))
