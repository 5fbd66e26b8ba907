"""Bipartite soft matching."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.matching import finish_matching
from tokcc.passes.ordering import LOWEST, ascending, topk
from tokcc.passes.piece import Selector

__all__ = ["Bipartite"]

aten = torch.ops.aten


class Bipartite(Selector):
    """Match even to odd positions and merge the r best pairs (ToMe, arXiv:2210.09461, section 3).

    The output is reordered as published, ``[protected | unmerged even | odd]``: the next layer's split runs over that
    order.

    Attributes:
        of: Vectors that similarity (cosine) is measured on.
        heads: Mean over heads before normalising (published), or all heads side by side.
    """

    kind: ClassVar[str] = "bipartite"
    wants_score: ClassVar[bool] = False

    of: FeatureKind = "keys"
    heads: Literal["mean", "concat"] = "mean"

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`Bipartite`."""
        del score
        b = cut.b
        if cut.last:
            cut.ctx.fail("bipartite matching cannot protect tokens at the end", help="leave out `protect.last`")
        metric = features(cut, self.of, self.heads)  # [B, N, D]
        n, p = cut.tokens, cut.first
        skip_a, skip_b = (p + 1) // 2, p // 2
        even = b.slice(metric, 1, 2 * skip_a, None, 2)  # [B, A, D]
        odd = b.slice(metric, 1, 2 * skip_b + 1, None, 2)  # [B, C, D]
        count_a = b.sub_sizes(b.floordiv_sizes(b.add_sizes(n, 1), 2), skip_a)
        count_b = b.sub_sizes(b.floordiv_sizes(n, 2), skip_b)
        removed = b.sub_sizes(cut.candidates, cut.count.kept(b, cut.candidates, cut.initial_candidates))
        r = b.min_sizes(removed, b.floordiv_sizes(cut.candidates, 2))
        similarity = b.matmul(even, b.transpose(odd, 1, 2))  # [B, A, C]
        valid = cut.valid
        if valid is not None:
            valid_a = b.slice(valid, 1, 2 * skip_a, None, 2)
            valid_b = b.slice(valid, 1, 2 * skip_b + 1, None, 2)
            similarity = b.where(b.unsqueeze(valid_b, 1), similarity, LOWEST)
        best = b.amax(similarity, 2)  # [B, A]
        to = b.argmax(similarity, 2)  # [B, A]
        merges = None
        if valid is not None:
            best = b.where(valid_a, best, 2 * LOWEST)
            order, merges = self._padded_order(cut, best, valid_a, count_a, r)
        else:
            order = topk(b, best, count_a, in_order=False)
        source_a = b.slice(order, 1, 0, r)  # [B, R]
        unmerged = ascending(b, b.slice(order, 1, r, count_a))  # [B, A - R]
        parts = [b.add(b.mul(unmerged, 2), 2 * skip_a)]
        if p:
            parts.insert(0, cut.per_sample(b.arange(p, cut.x)))
        parts.append(cut.per_sample(b.add(b.mul(b.arange(count_b, cut.x), 2), 2 * skip_b + 1)))
        keep = b.cat(parts, 1)
        left = b.sub_sizes(count_a, r)
        first = p + left if isinstance(left, int) else p
        slot = b.add(b.gather(to, 1, source_a), b.add_sizes(left, p))
        source = b.add(b.mul(source_a, 2), 2 * skip_a)
        size = b.sub_sizes(n, r)
        return finish_matching(cut, keep, source, slot, first, size, merges)

    def _padded_order(self, cut: Cut, best: Any, valid_a: Any, count_a: Any, r: Any) -> tuple[Any, Any]:
        """Order the even tokens so that each sample merges as many real pairs as it would alone.

        Returns:
            The order, and which of its first r really merge, ``[B, R]``.
        """
        b = cut.b
        by_score = topk(b, best, count_a, in_order=False)
        rank = b.arange(count_a, cut.x)
        real = cut.valid_count()  # [B]
        if cut.count.kind == "remove":
            wanted = b.call(aten.clamp_max.default, b.call(aten.div.Tensor_mode, real, 2, rounding_mode="floor"), int(cut.count.amount))
        else:
            left = b.sub(real, cut.count.kept_per_sample(b, real, real))
            wanted = b.call(aten.minimum.default, left, b.call(aten.div.Tensor_mode, real, 2, rounding_mode="floor"))
        own = b.unsqueeze(wanted, 1)  # [B, 1]
        merging = b.compare("lt", rank, own)  # [B, A] by rank
        real_by_rank = b.gather(valid_a, 1, by_score)
        # First the real pairs, then padding (it disappears), last the real tokens that stay.
        group = b.where(merging, 2, b.cast(b.logical_not(real_by_rank), torch.int64))
        again = topk(b, group, count_a, in_order=False)
        order = b.gather(by_score, 1, again)
        merges = b.slice(b.compare("lt", rank, own), 1, 0, r)
        return order, merges
