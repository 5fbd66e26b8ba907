"""Evenly spaced tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import keep_indices, masked
from tokcc.passes.piece import Selector

__all__ = ["Uniform"]

aten = torch.ops.aten


class Uniform(Selector):
    """Keep candidate ``floor(i * n / K)`` for i = 0..K-1; with padding, n and K are each sample's own."""

    kind: ClassVar[str] = "uniform"
    around_middle: ClassVar[bool] = True
    wants_score: ClassVar[bool] = False

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Uniform`."""
        del score
        b = cut.b
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        if cut.valid is not None:
            return keep_indices(cut, self._flags(cut), kept)
        steps = b.arange(kept, cut.x)
        spread = b.call(aten.div.Tensor_mode, b.mul(steps, cut.candidates), kept, rounding_mode="floor")
        if cut.middle is not None:
            index = cut.with_protected(cut.per_sample(spread))
            place = b.add_sizes(cut.in_front(kept), cut.first)
            return Kept(index, None, False, b.add_sizes(kept, cut.protected), middle=place)
        parts = [b.add(spread, cut.first) if cut.first else spread]
        if cut.first:
            parts.insert(0, b.arange(cut.first, cut.x))
        if cut.last:
            parts.append(b.add(b.arange(cut.last, cut.x), b.sub_sizes(cut.tokens, cut.last)))
        return Kept(b.cat(parts, 0), None, True, b.add_sizes(kept, cut.first + cut.last))

    def _flags(self, cut: Cut) -> Any:
        """Rate the candidates that a sample keeps alone 1, ``[B, N]``.

        Candidate j is kept when an i with ``floor(i * n / K) = j`` exists: when ``ceil(j * K / n) * n < (j + 1) * K``.
        """
        b = cut.b
        real = cut.valid_count()
        initial = cut.initial_valid_count() if cut.count.of_initial else real
        own = b.unsqueeze(cut.count.kept_per_sample(b, real, initial), 1)  # K, [B, 1]
        n = b.unsqueeze(b.call(aten.clamp_min.default, real, 1), 1)
        j = b.sub(b.unsqueeze(cut.positions(), 0), cut.first)  # [1, N]
        step = b.call(aten.div.Tensor_mode, b.sub(b.add(b.mul(j, own), n), 1), n, rounding_mode="floor")
        kept = b.compare("lt", b.mul(step, n), b.mul(b.add(j, 1), own))
        return masked(cut, b.cast(kept, torch.float32))
