"""Norms of keys, values or features."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.piece import Score

__all__ = ["Norm"]

aten = torch.ops.aten


class Norm(Score):
    """Norm of a token's key, value or feature vector.

    Attributes:
        of: Which vector.
        heads: Of keys and values: all heads side by side, or their mean.
        power: 2 = Euclidean, 1 = the sum of absolute values.
        sign: ``-1`` rates small norms high.
    """

    kind: ClassVar[str] = "norm"

    of: FeatureKind = "features"
    heads: Literal["concat", "mean"] = "concat"
    power: Literal[1, 2] = 2
    sign: Literal[1, -1] = 1

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, self.of, self.heads, normalise=False)
        norm = b.sum(b.call(aten.abs.default, x), 2) if self.power == 1 else b.sqrt(b.sum(b.mul(x, x), 2))
        return b.mul(norm, float(self.sign)) if self.sign < 0 else norm
