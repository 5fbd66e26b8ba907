"""One budget for all heads of a layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.errors import PlanError
from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import LOWEST, PROTECTED, CacheCut, Retained
from tokcc.passes.cache.ranks import places
from tokcc.passes.cache.selectors.best import Best

__all__ = ["PooledHeads"]

aten = torch.ops.aten


class PooledHeads(Best):
    """Let the heads of a layer compete for its entries, each with a floor (Ada-KV, arXiv:2407.11550).

    With a capacity C and W protected entries, ``base = C - W``: the best ``Hkv base`` entries of all heads together are
    counted, ``n_g`` of them in head g, which then keeps its best ``round((1 - floor) n_g) + int(floor base)`` and the
    protected ones. All heads have rows of ``widest * C`` slots, filled up with entries of no weight: what a head may
    keep beyond that is cut off, which differs from the published form with rows of different lengths.

    Attributes:
        floor: The part of the budget that every head has for itself.
        widest: Slots of a head, as a multiple of the capacity.
    """

    kind: ClassVar[str] = "pooled_heads"
    weighted: ClassVar[bool] = True

    floor: float = Field(default=0.2, ge=0, le=1)
    widest: float = Field(default=2.0, ge=1)

    def capacity(self, cut: CacheCut, planned: Count) -> Any:
        """See :class:`PooledHeads`."""
        if planned.kind != "tokens":
            raise PlanError(
                "heads compete for a fixed capacity",
                needed="`budget: {tokens: ...}`",
                help="give a number of entries instead of a share",
            )
        return int(self.widest * int(planned.amount))

    def select(self, cut: CacheCut, score: Any) -> Retained:
        """See :class:`PooledHeads`."""
        b = cut.b
        protected = cut.protected()  # [B, 1, L]
        real = b.unsqueeze(cut.real, 1)
        alive = b.logical_and(real, b.compare("gt", cut.weight, 0.0))  # [B, Hkv, L]
        candidate = alive if protected is None else b.logical_and(alive, b.logical_not(protected))
        rated = b.where(candidate, b.cast(score, torch.float32), LOWEST)
        stays = b.logical_and(candidate, b.compare("lt", self._places(cut, rated), self._most(cut, rated, candidate)))
        if protected is not None:
            stays = b.logical_or(stays, b.logical_and(alive, protected))
            rated = b.where(protected, PROTECTED, rated)
        # What does not stay has no weight and fills up, padding first.
        rating = b.where(real, b.where(stays, rated, b.where(alive, LOWEST / 4, LOWEST / 2)), LOWEST)
        index = b.call(torch.ops.tokcc.retain_slots.default, rating, cut.capacity)
        weight = b.cast(stays, torch.float32)
        if cut.decides is not None:
            weight = b.where(cut.decides, weight, cut.weight)
        return Retained(index, b.call(torch.ops.tokcc.gather_slots.default, weight, index))

    def _most(self, cut: CacheCut, rated: Any, candidate: Any) -> Any:
        """Return how many candidates each head may keep, fp32 ``[B, Hkv, 1]``."""
        b, heads = cut.b, cut.kv_heads
        base = max(int(cut.budget.amount) - cut.sinks - cut.recent, 0)
        every = b.mul_sizes(cut.total, heads)
        flat = b.reshape(rated, [-1, 1, every])
        pooled = b.call(torch.ops.tokcc.retain_slots.default, flat, b.min_sizes(heads * base, every))
        nothing = b.cast(b.mul(b.clamp_min(flat, 0.0), 0.0), torch.int64)
        marks = b.scatter(nothing, 2, pooled, b.add(b.mul(pooled, 0), 1))
        counted = b.logical_and(b.compare("gt", b.reshape(marks, [b.size(rated, 0), heads, cut.total]), 0), candidate)
        n = b.sum(b.cast(counted, torch.float32), 2, keepdim=True)
        return b.add(b.call(aten.round.default, b.mul(n, 1.0 - self.floor)), float(int(self.floor * base)))

    def _places(self, cut: CacheCut, rated: Any) -> Any:
        """Return how many entries of the head are better, fp32 ``[B, Hkv, L]``; of equal ones the older is."""
        b = cut.b
        flat = b.reshape(rated, [-1, cut.total])
        place = places(b, flat, cut.total)
        return b.reshape(b.cast(place, torch.float32), [b.size(rated, 0), cut.kv_heads, cut.total])
