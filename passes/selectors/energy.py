"""PiToMe's energy-ordered matching."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.matching import finish_matching
from tokcc.passes.ordering import LOWEST, topk
from tokcc.passes.piece import Selector

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
    """

    kind: ClassVar[str] = "energy"
    wants_score: ClassVar[bool] = False

    of: FeatureKind = "keys"
    form: Literal["elu", "paper"] = "elu"
    margin: float = Field(default=0.9, ge=-1.0, le=1.0)
    alpha: float = Field(default=1.0, gt=0.0)

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`Energy`."""
        del score
        b = cut.b
        if cut.last:
            cut.ctx.fail("energy matching cannot protect tokens at the end", help="leave out `protect.last`")
        n, p = cut.candidates, cut.first
        metric = cut.inner(features(cut, self.of, "mean"))  # [B, T, D]
        cosine = b.matmul(metric, b.transpose(metric, 1, 2))  # [B, T, T]
        valid = None if cut.valid is None else cut.inner(cut.valid)
        energy = self._energy(cut, cosine, valid)  # [B, T]
        removed = b.sub_sizes(n, cut.count.kept(b, n, cut.initial_candidates))
        r = b.min_sizes(removed, b.floordiv_sizes(n, 2))
        merges = None
        if valid is not None:
            energy = b.where(valid, energy, LOWEST)
        order = topk(b, energy, n, in_order=False)  # [B, T] by falling energy
        if valid is not None:
            order, merges = self._padded(cut, order, valid, n, r)
        pairs = b.slice(order, 1, 0, b.mul_sizes(r, 2))  # [B, 2R]
        left = b.slice(pairs, 1, 0, None, 2)  # [B, R] ranks 0, 2, 4, ...
        right = b.slice(pairs, 1, 1, None, 2)  # [B, R]
        rows = b.call(torch.ops.tokcc.gather_tokens.default, metric, left, 1, 0)
        columns = b.call(torch.ops.tokcc.gather_tokens.default, metric, right, 1, 0)
        between = b.matmul(rows, b.transpose(columns, 1, 2))  # [B, R, R]
        if merges is not None:
            between = b.where(b.unsqueeze(merges, 1), between, LOWEST)
        to = b.argmax(between, 2)  # [B, R]
        protected = b.slice(order, 1, b.mul_sizes(r, 2), n)  # [B, T - 2R] energy order
        parts = [b.add(protected, p) if p else protected, b.add(right, p) if p else right]
        if p:
            parts.insert(0, cut.per_sample(b.arange(p, cut.x)))
        keep = b.cat(parts, 1)
        start = b.add_sizes(b.sub_sizes(n, b.mul_sizes(r, 2)), p)
        slot = b.add(to, start)
        source = b.add(left, p) if p else left
        first = start if isinstance(start, int) else p
        return finish_matching(cut, keep, source, slot, first, b.sub_sizes(cut.tokens, r), merges)

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

    def _padded(self, cut: Cut, order: Any, valid: Any, n: Any, r: Any) -> tuple[Any, Any]:
        """Let each sample merge as many pairs as it would alone: real pairs first, then padding, then what stays."""
        b = cut.b
        real = cut.valid_count()
        left = b.sub(real, cut.count.kept_per_sample(b, real, real))
        own = b.call(aten.minimum.default, left, b.call(aten.div.Tensor_mode, real, 2, rounding_mode="floor"))
        rank = b.arange(n, cut.x)
        merging = b.compare("lt", rank, b.unsqueeze(b.mul(own, 2), 1))
        real_by_rank = b.gather(valid, 1, order)
        group = b.where(merging, 2, b.cast(b.logical_not(real_by_rank), torch.int64))
        order = b.gather(order, 1, topk(b, group, n, in_order=False))
        merges = b.compare("lt", b.arange(r, cut.x), b.unsqueeze(own, 1))
        return order, merges


