"""A score made of several others."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from tokcc.passes.cut import Cut
from tokcc.passes.piece import OtherScore, Score
from tokcc.passes.subset import candidates_valid, extremes

__all__ = ["Combined"]


class Combined(Score):
    """The product or the weighted sum of other scores.

    Attributes:
        of: The scores.
        by: ``product``, or ``sum``.
        weights: Factors of a sum, one for each score; all 1 by default.
        normalise: How each score is brought to a common scale first: ``none``, ``sum`` = divided by its sum over the
            candidates, ``minmax`` = to [0, 1] over the candidates.
    """

    kind: ClassVar[str] = "combined"

    of: tuple[OtherScore, ...] = Field(min_length=2)
    by: Literal["product", "sum"] = "product"
    weights: tuple[float, ...] | None = None
    normalise: Literal["none", "sum", "minmax"] = "none"

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None and (self.by != "sum" or len(self.weights) != len(self.of)):
            raise ValueError("`weights` goes with `by: sum`, one for each score")
        return self

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        total: Any = None
        for place, score in enumerate(self.of):
            own = self._scaled(cut, b.cast(score.emit(cut), torch.float32))
            if self.weights is not None:
                own = b.mul(own, self.weights[place])
            total = own if total is None else (b.mul if self.by == "product" else b.add)(total, own)
        return total

    def _scaled(self, cut: Cut, score: Any) -> Any:
        b = cut.b
        if self.normalise == "none":
            return score
        own = cut.inner(score)
        valid = candidates_valid(cut)
        if self.normalise == "sum":
            total = b.sum(own if valid is None else b.where(valid, own, 0.0), 1, keepdim=True)
            return b.div(score, b.clamp_min(total, 1e-12))
        low, high = extremes(b, own, valid)
        return b.div(b.sub(score, low), b.clamp_min(b.sub(high, low), 1e-12))
