"""Sampling by evenly spaced quantiles of the scores' distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import LOWEST, around, keep_counted, topk
from tokcc.passes.piece import Selector
from tokcc.passes.subset import candidates_valid

__all__ = ["InverseCdf"]

aten = torch.ops.aten


class InverseCdf(Selector):
    """Inverse transform sampling of scores (ATS, arXiv:2111.15667, section 3.2): the image says how many tokens stay.

    Scores in ascending order are summed up and scaled to [0, 1] (the lowest gets 0, the highest 1). Of
    ``references - 1`` evenly spaced values from the smallest positive sum to 1, each takes the token whose sum is
    nearest; repeats are one token. The budget is the number of slots: where more tokens are taken, the best scored
    stay; where fewer are, slots are empty.

    Attributes:
        references: Number of reference tokens, the class token included, as published.
    """

    kind: ClassVar[str] = "inverse_cdf"

    references: int = Field(default=197, ge=3)

    def removes(self, count: Count) -> bool:
        """The sampler decides, whatever the budget."""
        del count
        return True

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`InverseCdf`."""
        b = cut.b
        weight = b.cast(cut.inner(score), torch.float32)  # [B, M]
        valid = candidates_valid(cut)
        rating = weight
        if valid is not None:
            rating = b.where(valid, weight, LOWEST)  # first in ascending order, where it adds nothing
            weight = b.where(valid, weight, 0.0)
        n = cut.candidates
        order = topk(b, b.mul(rating, -1.0), n, in_order=False)  # [B, M] ascending by score
        taken = self._taken(cut, b.gather(weight, 1, order), None if valid is None else b.gather(valid, 1, order))
        taken = b.scatter(b.call(aten.zeros_like.default, weight), 1, order, b.cast(taken, torch.float32))
        chosen = b.compare("gt", taken, 0.5)  # [B, M] by position
        if valid is not None:
            chosen = b.logical_and(chosen, valid)
        slots = cut.count.kept(b, n, cut.initial_candidates)
        own = b.sum(b.cast(chosen, torch.int64), 1)  # [B]
        rating = b.where(chosen, b.cast(cut.inner(score), torch.float32), LOWEST)
        return replace(keep_counted(cut, around(cut, rating), slots, own, score), by_input=True)

    def _taken(self, cut: Cut, weight: Any, valid: Any) -> Any:
        """Return the tokens that some quantile takes, bool ``[B, M]`` in ascending order of score."""
        b = cut.b
        total = b.call(aten.cumsum.default, weight, 1)
        low = b.amin(total if valid is None else b.where(valid, total, -LOWEST), 1, keepdim=True)
        high = b.amax(total, 1, keepdim=True)
        share = b.div(b.sub(total, low), b.clamp_min(b.sub(high, low), 1e-30))
        place = b.arange(cut.candidates, cut.x)
        # The best token's share is 1 by definition, also where it is the only one.
        last = b.call(aten.eq.Scalar, place, b.sub_sizes(cut.candidates, 1))
        share = b.where(last, 1.0, share)  # [B, M]
        positive = b.compare("gt", share, 0.0)
        first = b.amin(b.where(positive, share, 2.0), 1, keepdim=True)  # [B, 1]
        steps = torch.arange(self.references - 1, dtype=torch.float64) / (self.references - 2)
        step = b.unsqueeze(b.constant("tokcc_quantiles", steps.to(torch.float32)), 0)  # [1, Q]
        wanted = b.add(b.mul(b.mul(b.sub(first, 1.0), -1.0), step), first)  # y0 + (1 - y0) k / (Q - 1)
        # What has no share is never nearest: every wanted value is at least the smallest positive share.
        share = b.where(positive, share, -2.0)
        apart = b.call(aten.abs.default, b.sub(b.unsqueeze(wanted, 2), b.unsqueeze(share, 1)))  # [B, Q, M]
        nearest = b.argmax(b.mul(apart, -1.0), 2)  # [B, Q]
        hit = b.compare("eq", b.unsqueeze(nearest, 2), place)  # [B, Q, M]
        return b.compare("gt", b.amax(b.cast(hit, torch.float32), 1), 0.5)
