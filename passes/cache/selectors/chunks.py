"""Whole chunks of entries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import PROTECTED, CacheCut, Retained
from tokcc.passes.cache.selectors.best import Best

__all__ = ["Chunks"]

aten = torch.ops.aten


class Chunks(Best):
    """Keep whole chunks, the same in all heads (ChunkKV, arXiv:2502.00299).

    The entries before the protected recent ones fall into chunks, counted from the first real one. A chunk is worth
    the mean over its tokens of the score summed over the heads. The incomplete chunk before the recent entries always
    stays. Every row keeps as many entries as the capacity, whatever its length: where the incomplete chunk leaves room
    for a part of a chunk only, the first entries of the next best chunk fill it.

    Attributes:
        length: Tokens in a chunk.
    """

    kind: ClassVar[str] = "chunks"

    length: int = Field(default=10, ge=1)

    def select(self, cut: CacheCut, score: Any) -> Retained:
        """See :class:`Chunks`."""
        b, c = cut.b, self.length
        summed = b.sum(b.cast(score, torch.float32), 1)  # [B, L]
        padding = b.sum(b.cast(b.logical_not(cut.real), torch.int64), 1, keepdim=True)  # [B, 1]
        last = cut.last_slot()
        count = b.floordiv_sizes(b.add_sizes(cut.total, c - 1), c)  # chunks, an incomplete one included
        place = b.arange(b.mul_sizes(count, c), score)
        slot = b.call(aten.minimum.default, b.add(padding, place), last)  # [B, chunks * c]
        means = b.mean(b.reshape(b.gather(summed, 1, slot), [-1, count, c]), 2)  # [B, chunks]
        ends = b.add(padding, b.mul(b.add(b.arange(count, score), 1), c))  # slot behind each chunk
        whole = b.compare("le", ends, b.sub(last, cut.recent - 1))
        rating = b.where(whole, means, PROTECTED / 2)
        own = b.call(aten.div.Tensor_mode, b.clamp_min(cut.rank(), 0), c, rounding_mode="floor")
        return super().select(cut, b.unsqueeze(b.gather(rating, 1, own), 1))
