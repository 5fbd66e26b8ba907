"""Pairs of neighbouring tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.matching import finish_matching
from tokcc.passes.ordering import LOWEST, topk
from tokcc.passes.piece import Selector

__all__ = ["Adjacent"]

aten = torch.ops.aten


class Adjacent(Selector):
    """Merge the most similar neighbours (A-ToMe, arXiv:2306.16009); the sequence stays in order.

    Attributes:
        of: Vectors that similarity (cosine of the head mean) is measured on.
        pairing: ``greedy`` = by falling similarity, no token in two pairs, one pick after another; ``parity`` = only the
            pairs (0,1), (2,3), ..., all at once.
    """

    kind: ClassVar[str] = "adjacent"
    wants_score: ClassVar[bool] = False

    of: FeatureKind = "keys"
    pairing: Literal["greedy", "parity"] = "greedy"

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`Adjacent`."""
        del score
        b = cut.b
        if cut.last:
            cut.ctx.fail("adjacent merging cannot protect tokens at the end", help="leave out `protect.last`")
        p, n = cut.first, cut.candidates
        x = cut.inner(features(cut, self.of, "mean"))  # [B, M, D]
        ahead = b.slice(x, 1, 1, None)
        behind = b.slice(x, 1, 0, b.sub_sizes(n, 1))
        cosine = b.sum(b.mul(behind, ahead), 2)  # [B, M - 1]
        pairs_wanted = b.sub_sizes(n, cut.count.kept(b, n, cut.initial_candidates))
        valid = None if cut.valid is None else cut.inner(cut.valid)
        if valid is not None:
            both = b.logical_and(b.slice(valid, 1, 1, None), b.slice(valid, 1, 0, b.sub_sizes(n, 1)))
            cosine = b.where(both, cosine, LOWEST)
        if self.pairing == "greedy":
            count = b.min_sizes(pairs_wanted, b.floordiv_sizes(b.add_sizes(n, 1), 3))
            left = self._greedy(cut, cosine, count)
        else:
            count = b.min_sizes(pairs_wanted, b.floordiv_sizes(n, 2))
            left = b.mul(topk(b, b.slice(cosine, 1, 0, None, 2), count, in_order=True), 2)
        merges = None
        if valid is not None:
            merges = self._merging(cut, left, cosine, count)
        source = b.add(left, 1)  # [B, R] relative; joins its left neighbour
        # Kept = everything but the sources, in order.
        flags = b.full([cut.batch.size, n], 1, torch.int64, cut.x)
        flags = b.scatter(flags, 1, source, b.full([cut.batch.size, count], 0, torch.int64, cut.x))
        keep = topk(b, flags, b.sub_sizes(n, count), in_order=True)
        place = b.sub(b.call(aten.cumsum.default, flags, 1), 1)  # position of a kept token in the output
        slot = b.gather(place, 1, left)
        keep = b.add(keep, p) if p else keep
        if p:
            keep = b.cat([cut.per_sample(b.arange(p, cut.x)), keep], 1)
            slot, source = b.add(slot, p), b.add(source, p)
        size = b.sub_sizes(cut.tokens, count)
        return finish_matching(cut, keep, source, slot, p, size, merges, in_order=True)

    def _greedy(self, cut: Cut, cosine: Any, count: Any) -> Any:
        """A pick excludes itself and both neighbours: greedy selection with those as the only similar ones."""
        b = cut.b
        size = b.sub_sizes(cut.candidates, 1)
        position = b.arange(size, cut.x)
        distance = b.call(aten.abs.default, b.sub(b.unsqueeze(position, 1), b.unsqueeze(position, 0)))
        # Two pairs clash when they share a token; a clash outweighs every cosine.
        clash = b.mul(b.cast(b.compare("le", distance, 1), torch.float32), 1e4)  # [M-1, M-1]
        clash = b.expand(b.unsqueeze(clash, 0), [cut.batch.size, -1, -1])
        return b.call(torch.ops.tokcc.greedy_select.default, clash, cosine, cosine, count)

    def _merging(self, cut: Cut, left: Any, cosine: Any, count: Any) -> Any:
        """Each sample merges as many pairs as it would alone, its best ones."""
        b = cut.b
        real = cut.valid_count()
        wanted = b.sub(real, cut.count.kept_per_sample(b, real, real))
        values = b.gather(cosine, 1, left)  # [B, R]
        order = topk(b, values, count, in_order=False)
        rank = b.scatter(order, 1, order, cut.per_sample(b.arange(count, cut.x)))
        return b.logical_and(b.compare("lt", rank, b.unsqueeze(wanted, 1)), b.compare("gt", values, LOWEST / 2))


