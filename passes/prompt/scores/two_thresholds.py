"""How far a token is above two thresholds on the text's attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.prompt.cut import PREFERRED, PromptCut
from tokcc.passes.prompt.piece import PromptScore
from tokcc.passes.prompt.rows import probs_of_rows, text_rows

__all__ = ["TwoThresholds"]


class TwoThresholds(Guided, PromptScore):
    """The larger of two ratios (MustDrop, arXiv:2411.10803).

    A token goes there when the text's attention to it, summed over rows, is below a share of all that goes to the
    image, and no row alone gives it more than a limit: when the larger of both ratios is below 1.

    Attributes:
        share: Of the attention to all candidates.
        most: Limit of a single row.
        keys: Read an input `key_tokens` that says which tokens stay in any case.
    """

    kind: ClassVar[str] = "two_thresholds"
    text_rows: ClassVar[bool] = True

    share: float = Field(default=0.001, gt=0)
    most: float = Field(default=0.001, gt=0)
    keys: bool = False

    def inputs(self) -> tuple[EngineInput, ...]:
        """See :class:`Guided`."""
        doc = "1 = a key token of the image, which is never dropped"
        found = EngineInput("key_tokens", ("B", "S"), doc, dtype=torch.int64, low=0, high=1)
        return (found,) if self.keys else ()

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`TwoThresholds`."""
        b = cut.b
        rows, weight = text_rows(cut)
        table = b.mean(probs_of_rows(cut, "own", rows), 1)  # [B, R, N]
        table = b.mul(table, b.unsqueeze(weight, 2))
        received = b.where(cut.candidates, b.sum(table, 1), 0.0)
        total = b.clamp_min(b.sum(received, 1, keepdim=True), 1e-30)
        ratio = _larger(b, b.div(received, b.mul(total, self.share)), b.div(b.amax(table, 1), self.most))
        if not self.keys:
            return ratio
        return b.where(b.compare("gt", cut.input("key_tokens", torch.int64), 0), PREFERRED, ratio)


def _larger(b: Builder, first: Any, second: Any) -> Any:
    return b.call(torch.ops.aten.maximum.default, first, second)
