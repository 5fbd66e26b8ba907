"""The best-scored candidates of each row, of which longer rows keep more."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.prompt.cut import PromptCut, Selected
from tokcc.passes.prompt.piece import PromptSelector

__all__ = ["TopKByRow"]


class TopKByRow(PromptSelector):
    """Keep as many candidates of each row as its quota says, those with the largest score; ties to the earlier token.

    Rows that keep fewer than others are filled up with padding, of which there is enough: the share of fewer candidates
    is smaller by no more than they are fewer. So a row gives in a batch what it gives alone.
    """

    kind: ClassVar[str] = "topk_by_row"

    def select(self, cut: PromptCut, score: Any) -> Selected:
        """See :class:`TopKByRow`."""
        b, topk = cut.b, torch.ops.tokcc.topk_select.default
        if cut.quota is None:
            cut.fail(
                "nothing says how many tokens each row keeps",
                needed="`reduce: {kind: recompute}`",
                help="add it to the step, or use `select: {kind: topk}`",
            )
        rating = b.where(b.logical_and(cut.candidates, cut.real), b.cast(score, torch.float32), LOWEST)
        best = b.call(topk, rating, cut.kept, False)  # [B, K], the best ones first
        wanted = b.cast(b.compare("lt", b.unsqueeze(b.arange(cut.kept, rating), 0), cut.quota), torch.float32)
        marked = b.scatter(b.mul(rating, 0.0), 1, best, wanted)  # [B, N]
        padding = b.cast(b.logical_not(cut.real), torch.float32)
        rank = b.where(cut.candidates, b.add(b.mul(marked, 2.0), padding), 3.0)
        return Selected(b.call(topk, rank, cut.kept, True), cut.kept, score)
