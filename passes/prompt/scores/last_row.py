"""Attention of the prompt's last token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cache.smoothing import Kernel, smoothed
from tokcc.passes.depth import later_layer
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore

__all__ = ["LastRow"]


class LastRow(PromptScore):
    """What the last token attends to, mean over heads (FastV, arXiv:2403.06764; LazyLLM, arXiv:2407.14057).

    Attributes:
        of: The layer in front of the cut; the one behind it: its norm and projections, applied before anything goes
            (PyramidDrop, arXiv:2410.17247); or a later one, by number or share of the depth: those between read all of
            the prompt first, and nothing of theirs is kept (GemFilter, arXiv:2409.17422).
        logits: Scaled products instead of probabilities (PromptDistill, arXiv:2503.23274).
        pool: Width of an average pool over neighbours, zeros counted beyond the ends; 1 = none.
        pool_last: The last token's own number counts in the pool; otherwise a zero stands there, too.
    """

    kind: ClassVar[str] = "last_row"

    of: Literal["own", "next"] | int | float = "own"
    logits: bool = False
    pool: Kernel = 1
    pool_last: bool = False

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`LastRow`."""
        b = cut.b
        if self.of == "own":
            view = cut.attention(cut.layer)
            query = b.slice(view.query, 2, b.sub_sizes(cut.tokens, 1), None)  # [B, H, 1, D]
        else:
            view = cut.probe(None) if self.of == "next" else cut.probe(None, self._layer(cut, self.of))
            query = view.query
        table = self._products(cut, view, query) if self.logits else cut.probs(view, query, None)
        row = b.mean(b.mean(b.sum(table, 3), 2), 1)  # [B, N]
        row = self._pooled(cut, row) if self.pool > 1 else row
        return row if isinstance(self.of, str) else cut.in_first_call(row)

    def _layer(self, cut: PromptCut, choice: float) -> int:
        try:
            return later_layer(choice, cut.layer, cut.num_layers)
        except ValueError as error:
            cut.fail(f"the score reads ahead: {error}", help="choose a layer behind the cut")

    def _products(self, cut: PromptCut, view: Any, query: Any) -> Any:
        b = cut.b
        groups = view.heads // view.kv_heads
        grouped = b.reshape(query, [b.size(query, 0), view.kv_heads, groups, 1, b.shape(query)[3]])
        keys = b.unsqueeze(b.transpose(view.key, 2, 3), 2)
        return b.cast(b.matmul(b.mul(grouped, view.scale), keys), torch.float32)

    def _pooled(self, cut: PromptCut, row: Any) -> Any:
        b = cut.b
        usable = cut.real
        if not self.pool_last:
            age = b.call(torch.ops.aten.flip.default, cut.slots(), [0])  # 0 at the last token
            usable = b.logical_and(usable, b.unsqueeze(b.compare("gt", age, 0), 0))
        row = b.where(usable, row, 0.0)
        return b.squeeze(smoothed(b, b.unsqueeze(row, 1), "avg", self.pool), 1)
