"""Bipartite soft matching."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.matching import interleaved, matched_per_sample, pairs, pairs_per_sample
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
        above: Thresholds, one for each chosen layer or one for all: every pair more similar than that merges, at most
            half of the candidates (DyMU, arXiv:2504.17040, section 3.1). The budget is then the number of slots: where
            fewer pairs pass, the next best merge too; where more do, slots are empty.
    """

    kind: ClassVar[str] = "bipartite"
    wants_score: ClassVar[bool] = False
    pairwise: ClassVar[bool] = True

    of: FeatureKind = "keys"
    heads: Literal["mean", "concat"] = "mean"
    above: tuple[float, ...] | None = Field(default=None, min_length=1)

    def removes(self, count: Count) -> bool:
        """With thresholds the pairs decide, whatever the budget."""
        return self.above is not None or super().removes(count)

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`Bipartite`."""
        del score
        b = cut.b
        if cut.last:
            cut.ctx.fail("bipartite matching cannot protect tokens at the end", help="leave out `protect.last`")
        metric = features(cut, self.of, self.heads)  # [B, N, D]
        n, p = cut.tokens, cut.first
        start_a = 2 * ((p + 1) // 2)
        # Where no odd token is left nothing merges, but a maximum needs one column.
        start_b = b.min_sizes(2 * (p // 2) + 1, b.sub_sizes(n, 1))
        even = b.slice(metric, 1, start_a, None, 2)  # [B, A, D]
        odd = b.slice(metric, 1, start_b, None, 2)  # [B, C, D]
        similarity = b.matmul(even, b.transpose(odd, 1, 2))  # [B, A, C]
        if cut.valid is not None:
            columns = b.slice(cut.valid, 1, start_b, None, 2)
            similarity = b.where(b.unsqueeze(columns, 1), similarity, LOWEST)
        best = b.amax(similarity, 2)  # [B, A]
        to = b.argmax(similarity, 2)  # [B, A] column
        r = pairs(cut)
        return (self._whole if cut.valid is None and self.above is None else self._counted)(cut, best, to, r)

    def _whole(self, cut: Cut, best: Any, to: Any, r: Any) -> Matched:
        b, p, n = cut.b, cut.first, cut.tokens
        skip_a, skip_b = (p + 1) // 2, p // 2
        count_a = b.sub_sizes(b.floordiv_sizes(b.add_sizes(n, 1), 2), skip_a)
        order = topk(b, best, count_a, in_order=False)
        left = b.sub_sizes(count_a, r)
        merged, unmerged = b.split(order, 1, [r, left])  # [B, R], [B, A - R]
        even = b.arange(n, cut.x, start=2 * skip_a, step=2)  # [A] positions
        odd = b.arange(n, cut.x, start=2 * skip_b + 1, step=2)
        parts = [b.look_up(even, ascending(b, unmerged)), cut.per_sample(odd)]
        if p:
            parts.insert(0, cut.per_sample(b.arange(p, cut.x)))
        return Matched(
            keep=b.cat(parts, 1),
            source=b.look_up(even, merged),
            slot=b.gather(to, 1, merged),
            first=b.add_sizes(left, p),
            size=b.sub_sizes(n, r),
        )

    def _counted(self, cut: Cut, best: Any, to: Any, r: Any) -> Matched:
        """Each sample merges its own number of pairs."""
        b, p, n = cut.b, cut.first, cut.tokens
        skip_a, skip_b = (p + 1) // 2, p // 2
        count_a = b.sub_sizes(b.floordiv_sizes(b.add_sizes(n, 1), 2), skip_a)
        even = cut.per_sample(b.arange(n, cut.x, start=2 * skip_a, step=2))  # [B, A] positions
        if cut.valid is not None:
            best = b.where(b.gather(cut.valid, 1, even), best, 2 * LOWEST)
        order = topk(b, best, count_a, in_order=False)
        own = pairs_per_sample(cut) if self.above is None else self._alike(cut, best)
        among_best = b.compare("lt", b.arange(count_a, cut.x), own)  # [B, A] by rank
        position = cut.positions()
        parity = b.call(aten.remainder.Scalar, position, 2)
        # Even positions in order, then odd ones; the protected ones stand before both.
        place = b.add(b.add(position, b.mul(parity, n)), p)
        if p:
            place = b.where(b.compare("lt", position, p), position, place)
        return matched_per_sample(
            cut,
            place=place,
            merging=interleaved(cut, b.gather(even, 1, order), among_best),
            to=interleaved(cut, even, b.add(b.mul(to, 2), 2 * skip_b + 1)),
            size=b.sub_sizes(n, r),
            most=None if self.above is None else b.floordiv_sizes(cut.candidates, 2),
        )

    def _alike(self, cut: Cut, best: Any) -> Any:
        """Return how many pairs each sample merges by its threshold, int64 ``[B, 1]``."""
        assert self.above is not None
        b = cut.b
        passing = b.sum(b.cast(b.compare("gt", best, cut.of_stage(self.above, "above")), torch.int64), 1)
        half = b.call(aten.div.Tensor_mode, cut.valid_count(), 2, rounding_mode="floor")
        at_most = b.call(aten.minimum.default, passing, half)
        return b.call(aten.maximum.default, b.unsqueeze(at_most, 1), pairs_per_sample(cut))
