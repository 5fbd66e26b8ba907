"""Evenly spaced tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Selector

__all__ = ["Uniform"]

aten = torch.ops.aten


class Uniform(Selector):
    """Keep candidate ``floor(i * n / K)`` for i = 0..K-1; with padding, n and K are each sample's own."""

    kind: ClassVar[str] = "uniform"
    wants_score: ClassVar[bool] = False

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Uniform`."""
        del score
        b = cut.b
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        size = b.add_sizes(kept, cut.first + cut.last)
        steps = b.arange(kept, cut.x)
        if cut.valid is None:
            spread = b.call(aten.div.Tensor_mode, b.mul(steps, cut.candidates), kept, rounding_mode="floor")
            return Kept(self._shared(cut, spread), None, True, size)
        real = cut.valid_count()
        initial = cut.initial_valid_count() if cut.count.of_initial else real
        own = cut.count.kept_per_sample(b, real, initial)  # [B]
        spread = b.call(
            aten.div.Tensor_mode,
            b.mul(steps, b.unsqueeze(real, 1)),
            b.unsqueeze(b.call(aten.clamp_min.default, own, 1), 1),
            rounding_mode="floor",
        )  # [B, K]
        filled = b.compare("lt", steps, b.unsqueeze(own, 1))
        # Empty slots must not repeat a real token: they take positions after the last real candidate where there are any.
        last = b.sub_sizes(cut.candidates, 1)
        spread = b.where(filled, spread, b.call(aten.clamp_max.default, steps, last))
        keep = cut.with_protected(spread)
        ends = [b.full([cut.batch.size, n], True, torch.bool, cut.x) for n in (cut.first, cut.last)]
        parts = [ends[0]] * bool(cut.first) + [filled] + [ends[1]] * bool(cut.last)
        valid = b.logical_and(b.gather(cut.valid, 1, keep), b.cat(parts, 1))
        return Kept(keep, valid, True, size)

    def _shared(self, cut: Cut, spread: Any) -> Any:
        """One index for all samples: ``[K]``."""
        b = cut.b
        parts = [b.add(spread, cut.first) if cut.first else spread]
        if cut.first:
            parts.insert(0, b.arange(cut.first, cut.x))
        if cut.last:
            parts.append(b.add(b.arange(cut.last, cut.x), b.sub_sizes(cut.tokens, cut.last)))
        return b.cat(parts, 0)
