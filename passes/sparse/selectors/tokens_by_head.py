"""Tokens that take part in a head's attention, as queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cache.runs import run_from
from tokcc.passes.sparse.compressed import TokenSets
from tokcc.passes.sparse.cut import FORCED, HIDDEN, SparseCut
from tokcc.passes.sparse.lines import among_last
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import best_of

__all__ = ["TokensByHead"]

aten = torch.ops.aten


class TokensByHead(SparseSelector):
    """The best tokens of a prompt for each head, the last ones among them; all others attend to nothing there.

    Token Sparse Attention (arXiv:2602.03216). The budget is what takes part, of a prompt's tokens; every head has as
    many. Calls with something in the cache stay dense.

    Attributes:
        last: Last tokens that always take part.
        least: Tokens beside those that take part at least.
    """

    kind: ClassVar[str] = "tokens_by_head"
    fills: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

    last: int = Field(default=128, ge=1)
    least: int = Field(default=1024, ge=0)

    def tokens(self, cut: SparseCut, score: Any, budget: Count) -> TokenSets:
        """See :class:`SparseSelector`."""
        b = cut.b
        rating = cut.for_heads(cut.shared(score, self.share))
        rating = run_from(b, b.squeeze(rating, 2), 2, cut.past, cut.new)  # [B, H, S]
        real = b.unsqueeze(cut.real_rows, 1)
        late = among_last(b, b.arange(cut.new, cut.key), b.min_sizes(self.last, cut.new))
        rating = b.where(real, b.where(late, FORCED, rating), HIDDEN)
        count = b.sum(b.cast(cut.real_rows, torch.int64), 1, keepdim=True)  # [B, 1]
        floor = self.last + self.least
        own = b.call(aten.clamp_min.default, budget.kept_per_sample(b, count, count), floor)
        own = b.call(aten.minimum.default, own, count)
        most = b.min_sizes(b.max_sizes(budget.kept(b, cut.new, cut.new), floor), cut.new)
        best = best_of(cut, rating, cut.new, b.unsqueeze(own, 2))
        # A sample with fewer is filled up with its padding, which stands in front.
        rank = b.where(best, 2.0, b.where(real, 0.0, 1.0))
        index = b.parts(b.call(aten.topk.default, rank, most, -1, True, True), 2)[1]
        index = b.parts(b.call(aten.topk.default, index, most, -1, False, True), 2)[0]
        behind = b.call(aten.flip.default, b.arange(most, cut.key), [0])
        return TokenSets(index, b.compare("lt", behind, own))
