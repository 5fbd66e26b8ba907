"""Attention among the candidates."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore
from tokcc.passes.prompt.rows import Of, candidate_rows, probs_of_rows, text_rows

__all__ = ["VisualAttention"]


class VisualAttention(PromptScore):
    """What candidates get from each other, and from the text if wanted; mean over heads (VisionDrop, 2506.22283).

    Attributes:
        of: Which layer's attention.
        even: Divide by how many candidates see a token, itself included: in a causal model early ones have more.
        text: Part of the text's attention in the score, mean over its rows (ATP-LLaVA, arXiv:2412.00447).
    """

    kind: ClassVar[str] = "visual_attention"
    text_rows: ClassVar[bool] = True

    of: Of = "own"
    even: bool = False
    text: float = Field(default=0.0, ge=0, le=1)

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`VisualAttention`."""
        b = cut.b
        rows, weight = candidate_rows(cut)
        table = b.mean(probs_of_rows(cut, self.of, rows), 1)  # [B, R, N]
        own = b.sum(b.mul(table, b.unsqueeze(weight, 2)), 1)
        assert cut.present is not None
        if self.even:
            own = b.div(own, b.clamp_min(b.add(b.mul(cut.rank(), -1), cut.present), 1))
        else:
            own = b.div(own, float(cut.present))
        if not self.text:
            return own
        rows, weight = text_rows(cut)
        table = b.mean(probs_of_rows(cut, self.of, rows), 1)
        other = b.sum(b.mul(table, b.unsqueeze(weight, 2)), 1)
        other = b.div(other, b.clamp_min(b.sum(weight, 1, keepdim=True), 1.0))
        return b.add(b.mul(own, 1.0 - self.text), b.mul(other, self.text))
