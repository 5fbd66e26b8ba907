"""PiToMe's energy-ordered matching."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.matching import interleaved, matched_per_sample, pairs, pairs_per_sample
from tokcc.passes.ordering import LOWEST, topk
from tokcc.passes.piece import Selector
from tokcc.passes.subset import candidates_valid

__all__ = ["Energy"]

aten = torch.ops.aten


class Energy(Selector):
    """Merge inside large groups of similar tokens, protect isolated ones (PiToMe, arXiv:2405.16148).

    ``E_i = mean_j f_m(cos_ij)`` with margin ``m = margin * (1 - layer / layers)``; the 2r tokens of highest energy are
    matched alternately in energy order.

    Attributes:
        of: Vectors that similarity is measured on.
        form: ``elu`` = ``f(w) = w - m`` above the margin (reference implementation), ``paper`` = ``f(w) = w``; below it
            both are ``alpha * (exp(w - m) - 1)``.
        margin: Margin of the first layer.
        alpha: See above.
        protect_from: Share of the depth from which on isolated tokens are protected. Layers before split all tokens
            alternately in energy order and merge the r most similar pairs (0.5 = reference implementation of ViT
            classifiers, 0 = paper).
    """

    kind: ClassVar[str] = "energy"
    wants_score: ClassVar[bool] = False
    pairwise: ClassVar[bool] = True

    of: FeatureKind = "keys"
    form: Literal["elu", "paper"] = "elu"
    margin: float = Field(default=0.9, ge=-1.0, le=1.0)
    alpha: float = Field(default=1.0, gt=0.0)
    protect_from: float = Field(default=0.0, ge=0.0, le=1.0)

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`Energy`."""
        del score
        b = cut.b
        if cut.last:
            cut.ctx.fail("energy matching cannot protect tokens at the end", help="leave out `protect.last`")
        n, p = cut.candidates, cut.first
        metric = cut.inner(features(cut, self.of, "mean"))  # [B, T, D]
        cosine = b.matmul(metric, b.transpose(metric, 1, 2))  # [B, T, T]
        valid = candidates_valid(cut)
        energy = self._energy(cut, cosine, valid)  # [B, T]
        if valid is not None:
            energy = b.where(valid, energy, LOWEST)
        order = topk(b, energy, n, in_order=False)  # [B, T] by falling energy
        r = pairs(cut)
        if cut.layer < math.ceil(self.protect_from * cut.num_layers - 1e-9):
            return self._unprotected(cut, metric, order, r)
        mergeable = b.mul_sizes(r, 2)
        left = b.slice(order, 1, 0, mergeable, 2)  # [B, R] ranks 0, 2, 4, ...
        # Where nothing merges there is no right side, but a maximum needs one column.
        right = b.slice(order, 1, b.min_sizes(1, b.sub_sizes(n, 1)), b.max_sizes(mergeable, 2), 2)  # ranks 1, 3, 5, ...
        rows = b.call(torch.ops.tokcc.gather_tokens.default, metric, left, 1, 0)
        columns = b.call(torch.ops.tokcc.gather_tokens.default, metric, right, 1, 0)
        between = b.matmul(rows, b.transpose(columns, 1, 2))  # [B, R, R]
        own = None
        if valid is not None:
            own = pairs_per_sample(cut)  # [B, 1]
            some = b.max_sizes(r, 1)
            between = b.where(b.unsqueeze(b.compare("lt", b.arange(some, cut.x), own), 1), between, LOWEST)
        to = b.argmax(between, 2)  # [B, R] column
        if own is not None:
            return self._padded(cut, order, own, left, b.gather(right, 1, to), r)
        protected = b.slice(order, 1, mergeable, n)  # [B, T - 2R] energy order
        kept = b.cat([protected, b.slice(right, 1, 0, r)], 1)
        parts = [b.add(kept, p) if p else kept]
        if p:
            parts.insert(0, cut.per_sample(b.arange(p, cut.x)))
        start = b.add_sizes(b.sub_sizes(n, mergeable), p)
        return Matched(
            keep=b.cat(parts, 1),
            source=b.add(left, p) if p else left,
            slot=to,
            first=start,
            size=b.sub_sizes(cut.tokens, r),
        )

    def _energy(self, cut: Cut, cosine: Any, valid: Any) -> Any:
        b = cut.b
        m = self.margin * (1.0 - cut.layer / cut.num_layers)
        shifted = b.sub(cosine, m)
        below = b.mul(b.sub(b.exp(b.call(aten.clamp_max.default, shifted, 0.0)), 1.0), self.alpha)
        above = shifted if self.form == "elu" else cosine
        rated = b.where(b.compare("ge", shifted, 0.0), above, below)
        if valid is None:
            return b.mean(rated, 2)
        real = b.unsqueeze(b.cast(valid, torch.float32), 1)
        count = b.clamp_min(b.sum(real, 2), 1.0)
        return b.div(b.sum(b.mul(rated, real), 2), count)

    def _padded(self, cut: Cut, order: Any, own: Any, left: Any, to: Any, r: Any) -> Matched:
        """Each sample merges its own number of pairs; padding is last in energy order, so the ranks are its own too."""
        b, p, n = cut.b, cut.first, cut.candidates
        rank = b.arange(n, cut.x)
        parity = b.call(aten.remainder.Scalar, rank, 2)
        matched = b.cast(b.compare("lt", rank, b.mul(own, 2)), torch.int64)  # [B, T] by rank
        place = b.add(b.add(b.mul(b.mul(matched, parity), n), rank), p)  # right sides come last
        if p:
            order, left, to = b.add(order, p), b.add(left, p), b.add(to, p)
        place = interleaved(cut, order, place)
        if p:
            position = cut.positions()
            place = b.where(b.compare("lt", position, p), position, place)
        return matched_per_sample(
            cut,
            place=place,
            merging=interleaved(cut, left, b.compare("lt", b.arange(r, cut.x), own)),
            to=interleaved(cut, left, to),
            size=b.sub_sizes(cut.tokens, r),
        )

    def _unprotected(self, cut: Cut, metric: Any, order: Any, r: Any) -> Matched:
        """Match even to odd ranks of all candidates and merge the most similar pairs; the others stay."""
        b, p, n = cut.b, cut.first, cut.candidates
        left = b.slice(order, 1, 0, None, 2)  # [B, A] ranks 0, 2, 4, ...
        right = b.slice(order, 1, b.min_sizes(1, b.sub_sizes(n, 1)), None, 2)  # [B, C] ranks 1, 3, 5, ...
        columns = b.call(torch.ops.tokcc.gather_tokens.default, metric, right, 1, 0)
        rows = b.call(torch.ops.tokcc.gather_tokens.default, metric, left, 1, 0)
        between = b.matmul(rows, b.transpose(columns, 1, 2))  # [B, A, C]
        if cut.valid is not None:
            valid = cut.inner(cut.valid)
            between = b.where(b.unsqueeze(b.gather(valid, 1, right), 1), between, LOWEST)
        best, to = b.amax(between, 2), b.argmax(between, 2)  # [B, A]
        if cut.valid is not None:
            best = b.where(b.gather(valid, 1, left), best, 2 * LOWEST)
        count = b.floordiv_sizes(b.add_sizes(n, 1), 2)
        edges = topk(b, best, count, in_order=False)  # [B, A] by falling similarity
        if p:
            left, right = b.add(left, p), b.add(right, p)
        if cut.valid is None:
            merged, unmerged = b.split(edges, 1, [r, b.sub_sizes(count, r)])
            parts = [b.gather(left, 1, unmerged), right]
            if p:
                parts.insert(0, cut.per_sample(b.arange(p, cut.x)))
            first = b.add_sizes(b.sub_sizes(count, r), p)
            source, slot = b.gather(left, 1, merged), b.gather(to, 1, merged)
            return Matched(b.cat(parts, 1), source, slot, first, b.sub_sizes(cut.tokens, r))
        ranked = b.gather(left, 1, edges)
        place = b.add(interleaved(cut, ranked, cut.per_sample(b.arange(count, cut.x))), p)
        behind = b.add(b.arange(b.size(right, 1), cut.x), b.add_sizes(n, p))  # right sides come last
        place = b.scatter(place, 1, right, cut.per_sample(behind))
        if p:
            position = cut.positions()
            place = b.where(b.compare("lt", position, p), position, place)
        return matched_per_sample(
            cut,
            place=place,
            merging=interleaved(cut, ranked, b.compare("lt", b.arange(count, cut.x), pairs_per_sample(cut))),
            to=interleaved(cut, left, b.gather(right, 1, to)),
            size=b.sub_sizes(cut.tokens, r),
        )
