"""Average dropped tokens into the most similar kept one, weighted by similarity."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Assigned, Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import LOWEST
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.soft_assign import SoftAssign

__all__ = ["SimilarityMean"]


class SimilarityMean(Reducer):
    """``y_i = (x_i + sum_j s_ij x_j) / (1 + sum_j s_ij)`` over the dropped tokens j that are most similar to i.

    Tokens join by the cosine s, which is their weight; one that is unlike all kept ones (``s < 0``) adds nothing
    (composed after TokenCorrCompressor, arXiv:2407.14439).

    Attributes:
        of: Vectors that similarity is measured on: their mean over heads.
    """

    kind: ClassVar[str] = "similarity_mean"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    of: FeatureKind = "keys"

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`SimilarityMean`."""
        b, size = cut.b, cut.candidates
        if cut.last or len(b.shape(chosen.index)) == 1:
            cut.ctx.fail(
                "tokens join kept ones that each sample chooses, none of them protected at the end",
                help="use a selection by score, without `protect.last`",
            )
        own = b.slice(chosen.index, 1, cut.first)  # [B, K]
        own = b.sub(own, cut.first) if cut.first else own
        valid = None if chosen.valid is None else b.slice(chosen.valid, 1, cut.first)
        metric = cut.inner(features(cut, self.of, "mean"))  # [B, M, D]
        rows = b.call(torch.ops.tokcc.gather_tokens.default, metric, own, 1, 0)
        cosine = b.matmul(rows, b.transpose(metric, 1, 2))  # [B, K, M]
        reach = cosine if valid is None else b.where(b.unsqueeze(valid, 2), cosine, LOWEST)
        nearest = b.unsqueeze(b.argmax(reach, 1), 1)  # [B, 1, M]
        slots = b.unsqueeze(b.arange(b.size(own, 1), cut.x), 1)  # [K, 1]
        joins = b.cast(b.compare("eq", nearest, slots), torch.float32)  # [B, K, M]
        itself = b.cast(b.compare("eq", b.unsqueeze(own, 2), b.arange(size, cut.x)), torch.float32)
        if valid is not None:
            itself = b.mul(itself, b.unsqueeze(b.cast(valid, torch.float32), 2))
        kept = b.amax(itself, 1, keepdim=True)  # [B, 1, M]: 1 where a candidate is kept
        weights = b.mul(b.mul(joins, b.clamp_min(cosine, 0.0)), b.add(b.mul(kept, -1.0), 1.0))
        if cut.valid is not None:
            weights = b.mul(weights, b.unsqueeze(b.cast(cut.inner(cut.valid), torch.float32), 1))
        weights = b.add(weights, itself)
        matrix = b.div(weights, b.clamp_min(b.sum(weights, 2, keepdim=True), 1e-12))
        assigned = Assigned(matrix, own, chosen.size, valid, chosen.ascending)
        return SoftAssign().reduce(cut, assigned, child)
