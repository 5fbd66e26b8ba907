"""Attention from all queries and from the last ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore
from tokcc.passes.cache.scores.window_attention import WindowAttention
from tokcc.passes.cache.smoothing import Kernel, smoothed

__all__ = ["GlobalLocal"]

aten = torch.ops.aten
_TINY = 1e-20


class GlobalLocal(CacheScore):
    """The larger of two kinds of attention (EMS, arXiv:2412.08521, details ours), smoothed by a mean.

    Global: what an entry received in this call, divided by the queries that could see it. Local: what the last
    ``window`` queries give it. Each is divided by its maximum over the head. The window's own columns are cut off.

    Attributes:
        window: Queries of the local part.
        kernel: Width of the mean, odd; it divides by the whole kernel at the edges too.
    """

    kind: ClassVar[str] = "global_local"
    once: ClassVar[bool] = True

    window: int = Field(default=32, ge=1)
    kernel: Kernel = 5

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`GlobalLocal`."""
        b = cut.b
        local = WindowAttention(window=self.window, pool="none").emit(cut)  # [B, Hkv, L]
        seen = b.div(cut.received, b.unsqueeze(b.cast(self._viewers(cut), torch.float32), 1))
        everywhere = b.where(cut.newest(self.window), 0.0, seen)
        score = b.call(aten.maximum.default, self._scaled(cut, everywhere), self._scaled(cut, local))
        return smoothed(b, score, "avg", self.kernel)

    def _viewers(self, cut: CacheCut) -> Any:
        """Return how many of the call's queries see a slot, int64 ``[B, L]``."""
        b = cut.b
        behind = b.add(cut.age(), 1)  # the slot's own query included
        new = b.cast(b.slice(cut.real, 1, cut.past, None), torch.int64)
        return b.call(aten.minimum.default, behind, b.clamp_min(b.sum(new, 1, keepdim=True), 1))

    def _scaled(self, cut: CacheCut, x: Any) -> Any:
        return cut.b.div(x, cut.b.clamp_min(cut.b.amax(x, 2, keepdim=True), _TINY))
