"""Pairs of neighbouring tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.matching import interleaved, matched_per_sample
from tokcc.passes.ordering import LOWEST, topk
from tokcc.passes.piece import Selector

__all__ = ["Adjacent"]

aten = torch.ops.aten


class Adjacent(Selector):
    """Merge the most similar neighbours (A-ToMe, arXiv:2306.16009); the sequence stays in order.

    Attributes:
        of: Vectors that similarity (cosine of the head mean) is measured on.
        pairing: ``greedy`` = by falling similarity, no token in two pairs, one pick after another; at most a third of
            the tokens. ``parity`` = only the pairs (0,1), (2,3), ..., all at once; at most half.
    """

    kind: ClassVar[str] = "adjacent"
    wants_score: ClassVar[bool] = False
    pairwise: ClassVar[bool] = True

    of: FeatureKind = "keys"
    pairing: Literal["greedy", "parity"] = "greedy"

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`Adjacent`."""
        del score
        b = cut.b
        if cut.last:
            cut.ctx.fail("adjacent merging cannot protect tokens at the end", help="leave out `protect.last`")
        n = cut.candidates
        x = cut.inner(features(cut, self.of, "mean"))  # [B, M, D]
        cosine = b.sum(b.mul(b.slice(x, 1, 0, b.sub_sizes(n, 1)), b.slice(x, 1, 1, None)), 2)  # [B, M - 1]
        if cut.valid is not None:
            valid = cut.inner(cut.valid)
            both = b.logical_and(b.slice(valid, 1, 0, b.sub_sizes(n, 1)), b.slice(valid, 1, 1, None))
            cosine = b.where(both, cosine, LOWEST)
        count = b.min_sizes(self._wanted(cut), self._most(b, n))
        if self.pairing == "greedy":
            left = self._greedy(cut, cosine, count)
        else:
            left = b.mul(topk(b, b.slice(cosine, 1, 0, None, 2), count, in_order=True), 2)
        return (self._whole if cut.valid is None else self._padded)(cut, cosine, left, count)

    def _wanted(self, cut: Cut) -> Any:
        """Return how many pairs the budget asks for; a share is one of the pairs, of which there is one less."""
        b, n = cut.b, cut.candidates
        if cut.count.kind != "share":
            return b.sub_sizes(n, cut.count.kept(b, n, cut.initial_candidates))
        joints = b.sub_sizes(n, 1)
        kept = cut.count.kept(b, joints, b.sub_sizes(cut.initial_candidates, 1))
        return b.sub_sizes(joints, kept)

    def _wanted_per_sample(self, cut: Cut) -> Any:
        """Return the same for each sample of a padded batch, at most what it can make, int64 ``[B, 1]``."""
        b = cut.b
        less = 1 if cut.count.kind == "share" else 0
        real = cut.valid_count()
        initial = cut.initial_valid_count() if cut.count.of_initial else real
        base = b.call(aten.clamp_min.default, b.sub(real, less), 0)
        kept = cut.count.kept_per_sample(b, base, b.call(aten.clamp_min.default, b.sub(initial, less), 0))
        greedy = self.pairing == "greedy"
        most = b.call(
            aten.div.Tensor_mode, b.add(real, 1) if greedy else real, 3 if greedy else 2, rounding_mode="floor"
        )
        return b.unsqueeze(b.call(aten.minimum.default, b.sub(base, kept), most), 1)

    def _most(self, b: Builder, n: Any) -> Any:
        """Return how many disjoint pairs are found whatever the similarities: a greedy pick may block two others."""
        if self.pairing == "greedy":
            return b.floordiv_sizes(b.add_sizes(n, 1), 3)
        return b.floordiv_sizes(n, 2)

    def _greedy(self, cut: Cut, cosine: Any, count: Any) -> Any:
        """A pick excludes itself and both neighbours: greedy selection with those as the only similar ones."""
        b = cut.b
        position = b.arange(b.sub_sizes(cut.candidates, 1), cut.x)
        distance = b.call(aten.abs.default, b.sub(b.unsqueeze(position, 1), b.unsqueeze(position, 0)))
        # Two pairs clash when they share a token; a clash outweighs every cosine.
        clash = b.mul(b.cast(b.compare("le", distance, 1), torch.float32), 1e4)  # [M-1, M-1]
        clash = b.expand(b.unsqueeze(clash, 0), [cut.batch.size, -1, -1])
        return b.call(torch.ops.tokcc.greedy_select.default, clash, cosine, cosine, count)

    def _whole(self, cut: Cut, cosine: Any, left: Any, count: Any) -> Matched:
        """Each source joins its left neighbour; everything else stays, in order."""
        del cosine
        b, p, n = cut.b, cut.first, cut.candidates
        source = b.add(left, 1)
        flags = b.full([cut.batch.size, n], 1, torch.int64, cut.x)
        flags = b.scatter(flags, 1, source, b.full([cut.batch.size, count], 0, torch.int64, cut.x))
        keep = topk(b, flags, b.sub_sizes(n, count), in_order=True)
        place = b.sub(b.call(aten.cumsum.default, flags, 1), 1)  # position of a kept token in the output
        slot = b.gather(place, 1, left)
        if p:
            keep = b.cat([cut.per_sample(b.arange(p, cut.x)), b.add(keep, p)], 1)
            source = b.add(source, p)
        return Matched(keep, source, slot, p, b.sub_sizes(cut.tokens, count), ascending=True)

    def _padded(self, cut: Cut, cosine: Any, left: Any, count: Any) -> Matched:
        """Each sample merges its own number of pairs: of those that were picked, the most similar ones."""
        b = cut.b
        values = b.gather(cosine, 1, left)  # [B, R]
        best = b.gather(left, 1, topk(b, values, count, in_order=False))
        own = b.compare("lt", b.arange(count, cut.x), self._wanted_per_sample(cut))
        position = cut.positions()
        behind = b.call(aten.clamp_min.default, b.sub(position, 1), 0)  # a source joins the token before it
        return matched_per_sample(
            cut,
            place=position,
            merging=interleaved(cut, b.add(best, cut.first + 1), own),
            to=cut.per_sample(behind),
            size=b.sub_sizes(cut.tokens, count),
            in_order=True,
        )
