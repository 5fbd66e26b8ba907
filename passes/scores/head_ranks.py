"""The rank that the class token's heads give to each token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.ordering import LOWEST, around, topk
from tokcc.passes.piece import Score
from tokcc.passes.scores.attention_rows import query_rows

__all__ = ["HeadRanks"]


class HeadRanks(Score):
    """Mean over heads of a candidate's rank in the class token's attention, 1 for the best, 1 / M for the last.

    What one head says loudly counts no more than what another says (TCA, arXiv:2410.14729, section 3.1).

    Attributes:
        rows: Whose attention: the class token's.
    """

    kind: ClassVar[str] = "head_ranks"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    rows: Literal["cls"] = "cls"

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 for protected tokens."""
        b, m = cut.b, cut.candidates
        row = b.cast(b.squeeze(query_rows(cut, cut.attention(), 0, 1), 2), torch.float32)  # [B, H, N]
        if cut.valid is not None:
            row = b.where(b.unsqueeze(cut.valid, 1), row, LOWEST)
        heads = b.shape(row)[1]
        row = b.slice(row, 2, cut.first, b.sub_sizes(cut.tokens, cut.last) if cut.last else None)
        both = b.mul_sizes(cut.batch.size, heads)
        order = topk(b, b.reshape(row, [both, m]), m, in_order=False)  # [B * H, M] best first
        falling = b.add(b.mul(b.arange(m, cut.x), -1), m)  # M, M - 1, ..., 1
        empty = b.full([both, m], 0, torch.int64, cut.x)
        ranks = b.scatter(empty, 1, order, b.expand(b.unsqueeze(falling, 0), [both, -1]))
        share = b.mean(b.cast(b.reshape(ranks, [cut.batch.size, heads, m]), torch.float32), 1)
        return around(cut, b.div(share, float(m)) if isinstance(m, int) else b.div(share, m))
