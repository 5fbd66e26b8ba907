"""Norms of keys, values or features."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.piece import Score

__all__ = ["Norm"]


class Norm(Score):
    """L2 norm of a token's key, value or feature vector.

    Attributes:
        of: Which vector.
        sign: ``-1`` rates small norms high.
    """

    kind: ClassVar[str] = "norm"

    of: Literal["keys", "values", "features"] = "features"
    sign: Literal[1, -1] = 1

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, self.of, "concat", normalise=False)
        norm = b.sqrt(b.sum(b.mul(x, x), 2))
        return b.mul(norm, float(self.sign)) if self.sign < 0 else norm
