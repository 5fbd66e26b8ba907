"""Greedy subset selection against redundancy: max-min distance and maximal marginal relevance."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import LOWEST, around, keep_indices, masked
from tokcc.passes.piece import Selector

__all__ = ["Greedy"]

aten = torch.ops.aten


class Greedy(Selector):
    """Pick one token, then again and again the one that the picked ones represent least.

    Attributes:
        of: Vectors that similarity (cosine) is measured on.
        relevance: Weight lam of the importance score I, scaled to [0, 1]: 0 = pure diversity (DivPrune,
            arXiv:2503.02175), between = maximal marginal relevance ``lam * I - (1 - lam) * max_s cos`` (IDPruner),
            1 = top-k.
        start: First pick: ``isolated`` = the largest distance to its nearest neighbour, ``score`` = the best score.
    """

    kind: ClassVar[str] = "greedy"
    wants_score: ClassVar[bool] = False

    of: FeatureKind = "features"
    relevance: float = Field(default=0.0, ge=0.0, le=1.0)
    start: Literal["isolated", "score"] = "isolated"

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Greedy`."""
        b = cut.b
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        x = cut.inner(features(cut, self.of, "concat"))  # [B, M, D]
        cosine = b.matmul(x, b.transpose(x, 1, 2))  # [B, M, M]
        valid = None if cut.valid is None else cut.inner(cut.valid)
        importance = None
        if score is not None:
            importance = self._scaled(cut, cut.inner(b.cast(score, torch.float32)), valid)
        if importance is not None and self.relevance == 1.0:
            return self._rated(cut, importance, kept)
        if valid is not None and cut.count.kind != "tokens":
            # Picks come back as a set, so it cannot be cut off where a shorter sample would have stopped.
            cut.ctx.fail(
                "greedy selection keeps the same number of tokens in every sample of a padded batch",
                help="use `budget: {tokens: K}`, or a model without a padding mask",
            )
        first = importance if self.start == "score" and importance is not None else self._isolation(cut, cosine, valid)
        zeros = b.call(aten.zeros_like.default, first)
        unary = zeros
        if importance is not None and self.relevance > 0.0:
            # argmax lam*I - (1-lam)*sim has the same winner as argmax lam/(1-lam)*I - sim.
            unary = b.mul(importance, self.relevance / (1.0 - self.relevance))
        if valid is not None:
            unary = b.where(valid, unary, LOWEST)
            first = b.where(valid, first, LOWEST)
        index = b.call(torch.ops.tokcc.greedy_select.default, cosine, unary, first, kept)  # [B, kept] ascending
        if valid is not None:
            # Padding is picked last, so a sample with fewer than K real tokens has all of them picked.
            picked = b.full([cut.batch.size, kept], 1.0, torch.float32, cut.x)
            return self._rated(cut, b.scatter(zeros, 1, index, picked), kept)
        return Kept(cut.with_protected(index), None, True, b.add_sizes(kept, cut.first + cut.last))

    def _rated(self, cut: Cut, rating: Any, kept: Any) -> Kept:
        """Keep the best by a rating of the candidates, ``[B, M]``."""
        return keep_indices(cut, masked(cut, around(cut, rating)), kept)

    def _scaled(self, cut: Cut, score: Any, valid: Any) -> Any:
        """Min-max scaling per sample."""
        b = cut.b
        low_of = score if valid is None else b.where(valid, score, -LOWEST)
        high_of = score if valid is None else b.where(valid, score, LOWEST)
        low, high = b.amin(low_of, 1, keepdim=True), b.amax(high_of, 1, keepdim=True)
        return b.div(b.sub(score, low), b.add(b.sub(high, low), 1e-6))

    def _isolation(self, cut: Cut, cosine: Any, valid: Any) -> Any:
        """Distance to the nearest other token: the second smallest of ``1 - cos`` in each column."""
        b = cut.b
        size = cut.candidates
        position = b.arange(size, cut.x)
        self_pair = b.compare("eq", b.unsqueeze(position, 1), b.unsqueeze(position, 0))  # [M, M]
        others = b.where(self_pair, -2.0, cosine)
        if valid is not None:
            others = b.where(b.unsqueeze(valid, 1), others, -2.0)
        return b.mul(b.sub(b.amax(others, 2), 1.0), -1.0)
