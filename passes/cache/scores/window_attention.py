"""Attention of the last queries of a prompt."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore
from tokcc.passes.cache.smoothing import Kernel, Pool, smoothed

__all__ = ["WindowAttention"]


class WindowAttention(CacheScore):
    """What the last ``window`` queries attend to, summed and smoothed along the tokens (SnapKV, arXiv:2404.14469).

    The softmax runs over all slots, then the window's own columns are cut off; the selector protects the window with
    ``recent``. A call with fewer tokens than the window gives those it has. Queries of padding see their own slot only,
    which the window's columns contain: they count nothing. Only the last rows are computed: ``[B, H, window, L]``.

    Attributes:
        window: Queries that rate.
        pool: How neighbours are smoothed; ``avg`` divides by the whole kernel at the edges too.
        kernel: Width of the pool, odd.
        rows: How the queries become one score.
        group: How the query heads of a key head become one score.
        when: Whether heads are reduced before or after pooling: it matters where a maximum is in play.
    """

    kind: ClassVar[str] = "window_attention"
    once: ClassVar[bool] = True

    window: int = Field(default=32, ge=1)
    pool: Pool = "avg"
    kernel: Kernel = 5
    rows: Literal["sum", "max"] = "sum"
    group: Literal["mean", "max"] = "mean"
    when: Literal["before_pool", "after_pool"] = "after_pool"

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`WindowAttention`."""
        b = cut.b
        rows = b.min_sizes(self.window, cut.new)
        return self._before_window(cut, self._over_rows(b, cut.probs(rows)))

    def _over_rows(self, b: Builder, probs: Any) -> Any:
        """``[B, Hkv, G, R, L]`` to ``[B, Hkv, G, L]``."""
        return b.sum(probs, 3) if self.rows == "sum" else b.amax(probs, 3)

    def _before_window(self, cut: CacheCut, rated: Any) -> Any:
        """Cut the window's columns off ``[B, Hkv, G, L]`` and return the score."""
        return self._smoothed(cut, cut.b.where(cut.newest(self.window), 0.0, rated))

    def _smoothed(self, cut: CacheCut, sums: Any) -> Any:
        """``[B, Hkv, G, L]`` to ``[B, Hkv, L]``."""
        b = cut.b
        if self.when == "before_pool":
            return self._pooled(b, self._grouped(b, sums))
        heads = self._pooled(b, b.reshape(sums, [-1, cut.heads, cut.total]))
        return self._grouped(b, b.reshape(heads, [-1, cut.kv_heads, cut.heads // cut.kv_heads, cut.total]))

    def _grouped(self, b: Builder, x: Any) -> Any:
        """``[B, Hkv, G, L]`` to ``[B, Hkv, L]``."""
        return b.mean(x, 2) if self.group == "mean" else b.amax(x, 2)

    def _pooled(self, b: Builder, x: Any) -> Any:
        return smoothed(b, x, self.pool, self.kernel)
