"""Attention of those text tokens that are about the image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore
from tokcc.passes.prompt.rows import probs_of_rows, text_rows

__all__ = ["RaterAttention"]


class RaterAttention(PromptScore):
    """What raters attend to, mean over heads and over them (SparseVLM, arXiv:2410.04417).

    Raters are found once, on what the first layer reads: every candidate spreads a softmax of products over the text,
    and a text token that gets more than the mean is one.
    """

    kind: ClassVar[str] = "rater_attention"
    text_rows: ClassVar[bool] = True

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`RaterAttention`."""
        b = cut.b
        rows, weight = text_rows(cut)
        if "rater" not in cut.facts:
            zeros = b.mul(b.cast(cut.real, torch.float32), 0.0)
            cut.facts["rater"] = b.scatter(zeros, 1, rows, self._raters(cut, rows, weight))
        rater = b.gather(cut.facts["rater"], 1, rows)
        table = b.mean(probs_of_rows(cut, "own", rows), 1)  # [B, R, N]
        total = b.clamp_min(b.sum(rater, 1, keepdim=True), 1.0)
        return b.div(b.sum(b.mul(table, b.unsqueeze(rater, 2)), 1), total)

    def _raters(self, cut: PromptCut, rows: Any, weight: Any) -> Any:
        """Return fp32 ``[B, R]``: 1 for raters."""
        b = cut.b
        entry = b.cast(cut.entry(), torch.float32)  # [B, N, C]
        text = cut.rows_of(entry, rows)
        logits = b.matmul(entry, b.transpose(text, 1, 2))  # [B, N, R]
        is_text = b.compare("gt", weight, 0.0)
        spread = b.softmax(b.where(b.unsqueeze(is_text, 1), logits, LOWEST), 2)
        image = b.cast(cut.candidates, torch.float32)
        # A sum has the same tokens above its mean as a mean.
        got = b.mul(b.sum(b.mul(spread, b.unsqueeze(image, 2)), 1), weight)
        mean = b.div(b.sum(got, 1, keepdim=True), b.clamp_min(b.sum(weight, 1, keepdim=True), 1.0))
        return b.mul(b.cast(b.compare("gt", got, mean), torch.float32), weight)
