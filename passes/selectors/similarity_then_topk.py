"""Zero-TPrune's two stages: near-duplicates of important tokens first, then the least important."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.among import among
from tokcc.passes.budget import Count
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import LOWEST, around, keep_indices, masked, topk
from tokcc.passes.piece import OtherScore, Selector

__all__ = ["SimilarityThenTopK"]

aten = torch.ops.aten


class SimilarityThenTopK(Selector):
    """Drop near-duplicates guided by importance, then the least important (Zero-TPrune, arXiv:2305.17328, section 3).

    The less important half of the candidates is compared with the more important half; the ``duplicates`` of largest
    best similarity go. Of the rest, the budget keeps the most important.

    Attributes:
        duplicates: Tokens that the similarity stage removes (at most half of the candidates).
        of: Vectors that similarity (cosine) is measured on.
        again: Rates what the first stage left, over the attention among those tokens; the first score decides without.
    """

    kind: ClassVar[str] = "similarity_then_topk"

    duplicates: int = Field(default=10, ge=0)
    of: FeatureKind = "keys"
    again: OtherScore | None = None

    def removes(self, count: Count) -> bool:
        """Duplicates go whatever the budget keeps."""
        return self.duplicates > 0 or super().removes(count)

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`SimilarityThenTopK`."""
        b = cut.b
        n = cut.candidates
        rating = cut.inner(masked(cut, score))  # [B, M]
        metric = cut.inner(features(cut, self.of, "concat"))
        order = topk(b, rating, n, in_order=False)  # [B, M] most important first
        better = b.floordiv_sizes(b.add_sizes(n, 1), 2)
        removed = b.min_sizes(self.duplicates, b.sub_sizes(n, better))
        metric = b.call(torch.ops.tokcc.gather_tokens.default, metric, order, 1, 0)  # by importance
        real = None
        if cut.valid is None:
            low, high = b.slice(metric, 1, better, None), b.slice(metric, 1, 0, better)
            closest = b.amax(b.matmul(low, b.transpose(high, 1, 2)), 2)  # [B, W]
            twins = b.add(topk(b, closest, removed, in_order=False), better)  # [B, removed] ranks
            gone = b.gather(order, 1, twins)
            worst = b.full([cut.batch.size, removed], 2 * LOWEST, torch.float32, cut.x)
        else:
            closest, own, real = self._padded(cut, metric)
            twins = topk(b, closest, removed, in_order=False)
            gone = b.gather(order, 1, twins)
            twin = b.compare("lt", b.arange(removed, cut.x), own)  # a sample may have fewer
            worst = b.cast(b.where(twin, 2 * LOWEST, b.gather(rating, 1, gone)), torch.float32)
        rating = b.scatter(rating, 1, gone, worst)
        kept = cut.count.kept(b, b.sub_sizes(n, removed), cut.initial_candidates)
        return keep_indices(cut, self._rated(cut, around(cut, rating)), kept, real=real)

    def _rated(self, cut: Cut, rating: Any) -> Any:
        """Rate the tokens that are left once more, ``[B, N]``."""
        if self.again is None:
            return rating
        b = cut.b
        stays = b.compare("gt", rating, 1.5 * LOWEST)
        if cut.valid is not None:
            stays = b.logical_and(stays, cut.valid)
        score = b.cast(self.again.emit(among(cut, stays)), torch.float32)
        return b.where(stays, score, rating)

    def _padded(self, cut: Cut, metric: Any) -> tuple[Any, Any, Any]:
        """Split each sample's real tokens at its own half.

        Returns:
            The largest similarity to a more important token, ``[B, M]`` by rank (lowest for those that are not
            candidates), how many duplicates go, ``[B, 1]``, and how many tokens that leaves, ``[B]``.
        """
        b = cut.b
        real = cut.valid_count()
        half = b.call(aten.div.Tensor_mode, real, 2, rounding_mode="floor")
        own = b.call(aten.clamp_max.default, half, self.duplicates)
        better = b.unsqueeze(b.sub(real, half), 1)  # [B, 1]
        rank = b.unsqueeze(b.arange(cut.candidates, cut.x), 0)
        high = b.compare("lt", rank, better)  # [B, M]
        low = b.logical_and(b.logical_not(high), b.compare("lt", rank, b.unsqueeze(real, 1)))
        similarity = b.matmul(metric, b.transpose(metric, 1, 2))  # [B, M, M]
        closest = b.amax(b.where(b.unsqueeze(high, 1), similarity, LOWEST), 2)
        return b.where(low, closest, 2 * LOWEST), b.unsqueeze(own, 1), b.sub(real, own)
