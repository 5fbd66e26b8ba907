"""Greedy subset selection against redundancy: max-min distance and maximal marginal relevance."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.crops import best_flags, crop_sizes, keep_flagged
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import LOWEST, keep_indices, masked
from tokcc.passes.piece import Selector
from tokcc.passes.subset import candidates_valid, kept_set, min_max, refuse_padded_share

__all__ = ["Greedy"]

aten = torch.ops.aten


class Greedy(Selector):
    """Pick one token, then again and again the one that the picked ones represent least.

    Attributes:
        of: Vectors that similarity (cosine) is measured on.
        relevance: Weight lam of the importance score I, scaled to [0, 1]: 0 = pure diversity (DivPrune,
            arXiv:2503.02175), between = maximal marginal relevance ``lam * I - (1 - lam) * max_s cos`` (IDPruner),
            1 = top-k.
        against: What a pick should be unlike: the ``nearest`` one picked (max-min), or ``all`` of them, by the sum of
            cosines (max-sum, ToDRE, arXiv:2505.18757).
        joined: How importance and diversity meet: ``weighted``, or their ``product`` ``I * (1 - max_s cos)`` with I
            scaled to the largest (ZOO-Prune, arXiv:2509.24837), whatever the relevance.
        over: What budget and selection are of: each ``sample``, or the whole ``batch``, which is one image in crops.
        start: First pick: ``isolated`` = the largest distance to its nearest neighbour, ``score`` = the best score.
    """

    kind: ClassVar[str] = "greedy"
    wants_score: ClassVar[bool] = False

    of: FeatureKind = "features"
    relevance: float = Field(default=0.0, ge=0.0, le=1.0)
    against: Literal["nearest", "all"] = "nearest"
    joined: Literal["weighted", "product"] = "weighted"
    over: Literal["sample", "batch"] = "sample"
    start: Literal["isolated", "score"] = "isolated"

    @property
    def of_batch(self) -> bool:
        """True with ``over: batch``."""
        return self.over == "batch"

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Greedy`."""
        b = cut.b
        x = cut.inner(features(cut, self.of, "concat"))  # [B, M, D]
        rating = None if score is None else cut.inner(b.cast(score, torch.float32))
        if self.over == "batch":
            return self._over_crops(cut, x, rating)
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        valid = candidates_valid(cut)
        if rating is not None and self.relevance == 1.0 and self.joined == "weighted":
            return keep_indices(cut, masked(cut, score), kept)
        refuse_padded_share(cut)
        return kept_set(cut, self._picked(cut, x, rating, valid, kept), kept)

    def _over_crops(self, cut: Cut, x: Any, rating: Any) -> Kept:
        """One selection over the tokens of all crops."""
        b = cut.b
        crops, size, total = crop_sizes(cut)
        flat = b.reshape(x, [1, crops * size, b.size(x, 2)])
        rating = None if rating is None else b.reshape(rating, [1, crops * size])
        if rating is not None and self.relevance == 1.0 and self.joined == "weighted":
            flags = best_flags(cut, rating, total)
        else:
            index = self._picked(cut, flat, rating, None, total)
            zeros = b.full([1, crops * size], 0, torch.int64, cut.x)
            flags = b.scatter(zeros, 1, index, b.full([1, total], 1, torch.int64, cut.x))
        return keep_flagged(cut, b.reshape(flags, [crops, size]), min(size, total))

    def _picked(self, cut: Cut, x: Any, score: Any, valid: Any, kept: Any) -> Any:
        """Pick ``kept`` of the tokens ``[B, M, D]``: int64 ``[B, kept]``, ascending."""
        b = cut.b
        cosine = b.matmul(x, b.transpose(x, 1, 2))  # [B, M, M]
        importance = None
        if score is not None:
            importance = self._scaled(cut, score, valid)
        elif self.joined == "product":
            cut.ctx.fail("a product of importance and diversity needs a score", help="give the step a `score`")
        if valid is not None and self.joined == "product":
            cut.ctx.fail("a product has no lowest value for padding", help="use a model without a padding mask")
        first = importance if self.start == "score" and importance is not None else self._isolation(cut, cosine, valid)
        zeros = b.call(aten.zeros_like.default, first)
        unary = zeros
        if importance is not None and self.joined == "product":
            unary = importance
        elif importance is not None and self.relevance > 0.0:
            # argmax lam*I - (1-lam)*sim has the same winner as argmax lam/(1-lam)*I - sim.
            unary = b.mul(importance, self.relevance / (1.0 - self.relevance))
        if valid is not None:
            unary = b.where(valid, unary, LOWEST)
            first = b.where(valid, first, LOWEST)
        form = "product" if self.joined == "product" else self.against
        return b.call(torch.ops.tokcc.greedy_select.default, cosine, unary, first, kept, form)

    def _scaled(self, cut: Cut, score: Any, valid: Any) -> Any:
        """Min-max scaling per sample; of a product by the maximum alone, so that the lowest is not zero."""
        b = cut.b
        if self.joined == "product":
            high_of = score if valid is None else b.where(valid, score, LOWEST)
            return b.clamp_min(b.div(score, b.clamp_min(b.amax(high_of, 1, keepdim=True), 1e-12)), 1e-12)
        return min_max(b, score, valid)

    def _isolation(self, cut: Cut, cosine: Any, valid: Any) -> Any:
        """Distance to the nearest other token: the second smallest of ``1 - cos`` in each column."""
        b = cut.b
        size = b.size(cosine, 1)
        position = b.arange(size, cut.x)
        self_pair = b.compare("eq", b.unsqueeze(position, 1), b.unsqueeze(position, 0))  # [M, M]
        others = b.where(self_pair, -2.0, cosine)
        if valid is not None:
            others = b.where(b.unsqueeze(valid, 1), others, -2.0)
        return b.mul(b.sub(b.amax(others, 2), 1.0), -1.0)
