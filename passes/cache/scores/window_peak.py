"""The highest attention from the last part of a prompt."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["WindowPeak"]


class WindowPeak(CacheScore):
    """The most that one of a text's last queries gives to an entry, mean over all heads (MPCache, arXiv:2501.06807).

    The last ``share`` of the tokens that a row has in this call rate, rounded up; each sees the slots up to its own.
    One set per layer.

    Attributes:
        share: Part of the text.
    """

    kind: ClassVar[str] = "window_peak"
    once: ClassVar[bool] = True

    share: float = Field(default=0.2, gt=0, le=1)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`WindowPeak`."""
        b = cut.b
        part = Count("share", Fraction(str(self.share)), "ceil")
        rows = part.kept(b, cut.new, cut.new)  # R, of the longest text in the batch
        heads = b.mean(b.mean(cut.probs(rows), 2), 1)  # [B, R, L]
        text = b.sum(b.cast(b.slice(cut.real, 1, cut.past, None), torch.int64), 1)  # [B]
        own = b.unsqueeze(part.kept_per_sample(b, text, text), 1)
        age = b.call(torch.ops.aten.flip.default, b.arange(rows, cut.key), [0])  # [R]
        rates = b.compare("lt", b.unsqueeze(age, 0), own)  # [B, R]
        peak = b.amax(b.where(b.unsqueeze(rates, 2), heads, 0.0), 1)
        return b.unsqueeze(peak, 1)
