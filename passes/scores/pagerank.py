"""Importance by PageRank on the attention graph."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.piece import Score
from tokcc.passes.scores.attention_rows import query_rows

__all__ = ["PageRank"]


class PageRank(Score):
    """Weighted PageRank: every token votes with its attention row, weighted by its own importance.

    ``v <- A^T v`` from a uniform start (Zero-TPrune, arXiv:2305.17328, algorithm 1); heads whose importance varies too
    little or too much over tokens are left out, the others combined by the root of the mean square.

    Attributes:
        iterations: In the first, middle and last third of the layers.
        min_variance: Heads below are left out; variance of ``N * v`` over tokens.
        max_variance: Heads above are left out.
    """

    kind: ClassVar[str] = "pagerank"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    full_attention: ClassVar[bool] = True

    iterations: tuple[int, int, int] = (30, 5, 1)
    min_variance: float = Field(default=0.01, ge=0.0)
    max_variance: float = Field(default=0.7, gt=0.0)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        probs = b.cast(query_rows(cut, cut.attention(), 0, None), torch.float32)  # [B, H, N, N]
        vote = b.cast(self._start(cut), torch.float32)  # [B or 1, 1, 1, N]
        for _ in range(self.iterations[min(2, 3 * cut.layer // cut.num_layers)]):
            vote = b.matmul(vote, probs)  # [B, H, 1, N]
        vote = b.squeeze(vote, 2)  # [B, H, N]
        used = self._heads(cut, vote)  # [B, H, 1]
        squares = b.sum(b.mul(b.mul(vote, vote), used), 1)
        return b.sqrt(b.div(squares, b.sum(used, 1)))

    def _start(self, cut: Cut) -> Any:
        b = cut.b
        if cut.valid is None:
            ones = b.full([1, 1, 1, cut.tokens], 1.0, torch.float32, cut.x)
            return b.div(ones, float(cut.tokens)) if isinstance(cut.tokens, int) else b.div(ones, cut.tokens)
        real = b.cast(cut.valid, torch.float32)
        share = b.div(real, b.sum(real, 1, keepdim=True))
        return b.unsqueeze(b.unsqueeze(share, 1), 1)

    def _heads(self, cut: Cut, vote: Any) -> Any:
        """1 for the heads that count; all of them where none would be left."""
        b = cut.b
        mean = b.mean(vote, 2, keepdim=True)
        off = b.sub(vote, mean)
        if cut.valid is None:
            variance = b.mean(b.mul(off, off), 2, keepdim=True)
            count: Any = cut.tokens
            scaled = b.mul(b.mul(variance, count), count)
        else:
            real = b.unsqueeze(b.cast(cut.valid, torch.float32), 1)  # [B, 1, N]
            total = b.sum(real, 2, keepdim=True)
            mean = b.div(b.sum(b.mul(vote, real), 2, keepdim=True), total)
            off = b.mul(b.sub(vote, mean), real)
            variance = b.div(b.sum(b.mul(off, off), 2, keepdim=True), total)
            scaled = b.mul(variance, b.mul(total, total))
        inside = b.logical_and(b.compare("ge", scaled, self.min_variance), b.compare("le", scaled, self.max_variance))
        used = b.cast(inside, torch.float32)  # [B, H, 1]
        none = b.compare("eq", b.sum(used, 1, keepdim=True), 0.0)
        return b.where(none, 1.0, used)
