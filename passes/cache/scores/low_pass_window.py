"""Attention of the last queries, low-pass filtered along the tokens."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.scores.window_attention import WindowAttention

__all__ = ["LowPassWindow"]

aten = torch.ops.aten


class LowPassWindow(WindowAttention):
    """SnapKV's score, blended with its slow part along time (after AudioKV, arXiv:2604.06694).

    ``s' = (1 - blend) s + blend low(s)``, at least 0, over the n entries of a row before the window: ``low`` keeps the
    lowest ``ceil(band (n / 2 + 1))`` of the n / 2 + 1 frequencies of the discrete Fourier transform. It is written as
    products with tables of those frequencies alone, so that rows of a padded batch have each its own length.

    Attributes:
        blend: Share of the filtered score.
        band: Share of the frequencies that pass.
    """

    kind: ClassVar[str] = "low_pass_window"

    blend: float = Field(default=0.5, ge=0, le=1)
    band: float = Field(default=0.1, gt=0, le=1)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`LowPassWindow`."""
        score = super().emit(cut)  # [B, Hkv, L]; nothing in the window
        if not self.blend:
            return score
        b = cut.b
        before = b.logical_and(cut.real, b.logical_not(b.unsqueeze(cut.newest(self.window), 0)))  # [B, L]
        score = b.where(b.unsqueeze(before, 1), score, 0.0)
        n = b.clamp_min(b.sum(b.cast(before, torch.int64), 1, keepdim=True), 1)  # [B, 1]
        share = Count("share", Fraction(str(self.band)), "ceil")
        # All frequencies that pass in the longest row that there could be; a shorter one takes fewer.
        most = b.add_sizes(b.floordiv_sizes(cut.total, 2), 1)
        frequency = b.arange(share.kept(b, most, most), score)  # [M]
        own = b.add(_quotient(b, n, 2), 1)
        passes = b.compare("lt", frequency, share.kept_per_sample(b, own, own))  # [B, M]
        twice = b.logical_or(b.compare("eq", frequency, 0), b.compare("eq", b.mul(frequency, 2), n))
        factor = b.where(passes, b.where(twice, b.full([1], 1.0, torch.float32, score), 2.0), 0.0)
        factor = b.div(factor, b.cast(n, torch.float32))  # [B, M]
        turns = b.mul(b.unsqueeze(cut.rank(), 2), frequency)  # [B, L, M]
        whole = b.unsqueeze(n, 2)
        rest = b.sub(turns, b.mul(_quotient(b, turns, whole), whole))  # exact, however long the row
        angle = b.mul(b.div(b.cast(rest, torch.float32), b.cast(whole, torch.float32)), 2 * math.pi)
        low = None
        for table in (b.call(aten.cos.default, angle), b.call(aten.sin.default, angle)):
            parts = b.mul(b.matmul(score, table), b.unsqueeze(factor, 1))  # [B, Hkv, M]
            wave = b.matmul(parts, b.transpose(table, 1, 2))
            low = wave if low is None else b.add(low, wave)
        blended = b.add(b.mul(score, 1.0 - self.blend), b.mul(low, self.blend))
        return b.where(b.unsqueeze(before, 1), b.clamp_min(blended, 0.0), 0.0)


def _quotient(b: Builder, x: Any, by: Any) -> Any:
    return b.call(aten.div.Tensor_mode, x, by, rounding_mode="floor")
