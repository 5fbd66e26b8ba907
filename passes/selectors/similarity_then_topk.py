"""Zero-TPrune's two stages: near-duplicates of important tokens first, then the least important."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import LOWEST, keep_indices, masked, topk
from tokcc.passes.piece import Selector

__all__ = ["SimilarityThenTopK"]


class SimilarityThenTopK(Selector):
    """Drop near-duplicates guided by importance, then the least important (Zero-TPrune, arXiv:2305.17328, section 3).

    The less important half of the candidates is compared with the more important half; the ``duplicates`` of largest
    best similarity go. Of the rest, the budget keeps the most important.

    Attributes:
        duplicates: Tokens that the similarity stage removes (at most half of the candidates).
        of: Vectors that similarity (cosine) is measured on.
    """

    kind: ClassVar[str] = "similarity_then_topk"

    duplicates: int = Field(default=10, ge=0)
    of: FeatureKind = "keys"

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`SimilarityThenTopK`."""
        b = cut.b
        n = cut.candidates
        rating = cut.inner(masked(cut, score))  # [B, M]
        metric = cut.inner(features(cut, self.of, "concat"))
        order = topk(b, rating, n, in_order=False)  # [B, M] most important first
        better = b.floordiv_sizes(b.add_sizes(n, 1), 2)
        worse = b.sub_sizes(n, better)
        removed = b.min_sizes(self.duplicates, worse)
        high = b.slice(order, 1, 0, better)
        low = b.slice(order, 1, better, n)  # [B, W]
        gather = torch.ops.tokcc.gather_tokens.default
        similarity = b.matmul(
            b.call(gather, metric, low, 1, 0), b.transpose(b.call(gather, metric, high, 1, 0), 1, 2)
        )  # [B, W, M - W]
        closest = b.amax(similarity, 2)  # [B, W]
        twins = topk(b, closest, removed, in_order=False)  # [B, removed] positions in `low`
        gone = b.gather(low, 1, twins)
        floor = b.full([cut.batch.size, removed], 2 * LOWEST, torch.float32, cut.x)
        rating = b.scatter(rating, 1, gone, floor)
        left = b.sub_sizes(n, removed)
        kept = cut.count.kept(b, left, cut.initial_candidates)
        sides = [b.full([cut.batch.size, k], 0.0, torch.float32, cut.x) for k in (cut.first, cut.last)]
        whole = b.cat([sides[0]] * bool(cut.first) + [rating] + [sides[1]] * bool(cut.last), 1)
        return keep_indices(cut, whole, kept)
