"""The best-scored candidates, beside a grid of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.prompt.cut import PREFERRED, PromptCut, Selected
from tokcc.passes.prompt.piece import PromptSelector
from tokcc.passes.prompt.selectors.topk import TopK

__all__ = ["GridAndTopK"]


class GridAndTopK(PromptSelector):
    """Keep every ``stride``-th row and column of the image, and the best others (ATP-LLaVA, arXiv:2412.00447).

    Attributes:
        width: Tokens in a row of the image; they come row by row.
        stride: Of the grid; 0 = none.
    """

    kind: ClassVar[str] = "grid_and_topk"

    width: int = Field(default=24, ge=1)
    stride: int = Field(default=4, ge=0)

    def select(self, cut: PromptCut, score: Any) -> Selected:
        """See :class:`GridAndTopK`."""
        if not self.stride:
            return TopK().select(cut, score)
        b = cut.b
        if "place" not in cut.facts:
            cut.facts["place"] = cut.rank()
        row, column = _divided(b, cut.facts["place"], self.width)
        on_row, on_column = (b.compare("eq", _divided(b, x, self.stride)[1], 0) for x in (row, column))
        return TopK().select(cut, b.where(b.logical_and(on_row, on_column), PREFERRED, score))


def _divided(b: Builder, x: Any, by: int) -> tuple[Any, Any]:
    """Return quotient and remainder."""
    whole = b.call(torch.ops.aten.div.Tensor_mode, x, by, rounding_mode="floor")
    return whole, b.sub(x, b.mul(whole, by))
