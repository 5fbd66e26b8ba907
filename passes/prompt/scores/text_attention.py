"""Attention of the text behind the image."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore
from tokcc.passes.prompt.rows import Of, probs_of_rows, text_rows

__all__ = ["TextAttention"]


class TextAttention(PromptScore):
    """What the tokens behind the last candidate attend to, mean over heads and over them (AdaToken-3D, 2505.12782).

    Attributes:
        of: Which layer's attention.
    """

    kind: ClassVar[str] = "text_attention"
    text_rows: ClassVar[bool] = True

    of: Of = "own"

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`TextAttention`."""
        b = cut.b
        rows, weight = text_rows(cut)
        table = b.mean(probs_of_rows(cut, self.of, rows), 1)  # [B, R, N]
        total = b.clamp_min(b.sum(weight, 1, keepdim=True), 1.0)
        return b.div(b.sum(b.mul(table, b.unsqueeze(weight, 2)), 1), total)
