"""Attention of the text to the image, weighted by the attention within the text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore
from tokcc.passes.prompt.rows import probs_of_rows, text_rows

__all__ = ["TextWeighted"]


class TextWeighted(PromptScore):
    """Text rows, each weighted by what it gives to and gets from other text (AdaptInfer, arXiv:2508.06084).

    For each head, with the attention ``A`` among text tokens, ``w_t`` is the column sum of ``A + A^T - diag(A)``; the
    score is ``sum_h sum_t w_h[t] A_h[t, j]``.
    """

    kind: ClassVar[str] = "text_weighted"
    text_rows: ClassVar[bool] = True

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`TextWeighted`."""
        b = cut.b
        rows, weight = text_rows(cut)
        probs = probs_of_rows(cut, "own", rows)  # [B, H, R, N]
        among = b.call(torch.ops.tokcc.gather_tokens.default, probs, rows, 3, 0)  # [B, H, R, R]
        down, right = b.unsqueeze(b.unsqueeze(weight, 1), 3), b.unsqueeze(b.unsqueeze(weight, 1), 1)
        among = b.mul(b.mul(among, down), right)
        place = b.arange(b.size(rows, 1), rows)
        own = b.cast(b.compare("eq", b.unsqueeze(place, 1), place), torch.float32)
        both = b.sub(b.add(b.sum(among, 2), b.sum(among, 3)), b.sum(b.mul(among, own), 3))  # [B, H, R]
        return b.sum(b.squeeze(b.matmul(b.unsqueeze(both, 2), probs), 2), 1)
