"""Attention of the prompt's last token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cache.smoothing import Kernel, smoothed
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore

__all__ = ["LastRow"]


class LastRow(PromptScore):
    """What the last token attends to, mean over heads (FastV, arXiv:2403.06764; LazyLLM, arXiv:2407.14057).

    Attributes:
        of: The layer in front of the cut, or the one behind it: its norm and projections, applied before anything goes
            (PyramidDrop, arXiv:2410.17247).
        logits: Scaled products instead of probabilities (PromptDistill, arXiv:2503.23274).
        pool: Width of an average pool over neighbours, zeros counted beyond the ends and at the last token; 1 = none.
    """

    kind: ClassVar[str] = "last_row"

    of: Literal["own", "next"] = "own"
    logits: bool = False
    pool: Kernel = 1

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`LastRow`."""
        b = cut.b
        if self.of == "next":
            view = cut.probe(None)
            query = view.query
        else:
            view = cut.attention(cut.layer)
            query = b.slice(view.query, 2, b.sub_sizes(cut.tokens, 1), None)  # [B, H, 1, D]
        table = self._products(cut, view, query) if self.logits else cut.probs(view, query, None)
        row = b.mean(b.mean(b.sum(table, 3), 2), 1)  # [B, N]
        return self._pooled(cut, row) if self.pool > 1 else row

    def _products(self, cut: PromptCut, view: Any, query: Any) -> Any:
        b = cut.b
        groups = view.heads // view.kv_heads
        grouped = b.reshape(query, [b.size(query, 0), view.kv_heads, groups, 1, b.shape(query)[3]])
        keys = b.unsqueeze(b.transpose(view.key, 2, 3), 2)
        return b.cast(b.matmul(b.mul(grouped, view.scale), keys), torch.float32)

    def _pooled(self, cut: PromptCut, row: Any) -> Any:
        b = cut.b
        age = b.call(torch.ops.aten.flip.default, cut.slots(), [0])  # 0 at the last token
        usable = b.logical_and(cut.real, b.unsqueeze(b.compare("gt", age, 0), 0))
        row = b.where(usable, row, 0.0)
        return b.squeeze(smoothed(b, b.unsqueeze(row, 1), "avg", self.pool), 1)
