"""Scores that are joined in the logarithm, so that each of them can veto."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from tokcc.passes.cut import Cut
from tokcc.passes.ordering import around
from tokcc.passes.piece import OtherScore, Score
from tokcc.passes.subset import candidates_valid, min_max

__all__ = ["LogSum"]


class LogSum(Score):
    """``sum_i w_i log(s_i + eps)`` over scores that are scaled to [0, 1] (FlashVLM, arXiv:2512.20561).

    A softmax with a temperature over the tokens, as in the paper, leaves their order as it is and is left out.

    Attributes:
        of: The scores.
        weights: Their weights.
        eps: How hard a score of zero vetoes.
    """

    kind: ClassVar[str] = "log_sum"

    of: tuple[OtherScore, ...] = Field(min_length=2)
    weights: tuple[float, ...] | None = None
    eps: float = Field(default=1e-6, gt=0.0)

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError("there is one weight for each score")
        return self

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b = cut.b
        total: Any = None
        for place, score in enumerate(self.of):
            own = cut.inner(b.cast(score.emit(cut), torch.float32))
            scaled = min_max(b, own, candidates_valid(cut))
            weight = 1.0 if self.weights is None else self.weights[place]
            # Padding may lie below the real extremes, where there is no logarithm.
            term = b.mul(b.log(b.add(b.clamp_min(scaled, 0.0), self.eps)), weight)
            total = term if total is None else b.add(total, term)
        return around(cut, total)
