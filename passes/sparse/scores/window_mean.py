"""Keys by the mean attention of the last queries."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.cache.smoothing import Kernel, smoothed
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.lines import among_last, last_probabilities
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["WindowMean"]


class WindowMean(SparseScore):
    """What the last queries of a call give a key on average, smoothed (Token Sparse Attention, arXiv:2602.03216).

    Attributes:
        window: Last queries.
        kernel: Width of a mean along the keys in front of them; 1 = none.
    """

    kind: ClassVar[str] = "window_mean"

    window: int = Field(default=128, ge=1)
    kernel: Kernel = 7

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        if block_k != 1:
            raise ValueError("`blocks: {query: 1, key: 1}`: it rates single keys")

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        probs, many = last_probabilities(cut, self.window)
        mean = b.div(b.sum(probs, 2), many)  # [B, H, L]
        before = b.logical_not(among_last(b, cut.slots, b.min_sizes(self.window, cut.new)))
        return b.unsqueeze(smoothed(b, b.mul(mean, b.cast(before, b.dtype(mean))), "avg", self.kernel), 2)
