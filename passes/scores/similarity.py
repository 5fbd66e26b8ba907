"""Cosine similarity to a summary of all tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tokcc.passes.cut import Cut
from tokcc.passes.features import features, normalised
from tokcc.passes.piece import Score

__all__ = ["Similarity"]


class Similarity(Score):
    """Cosine of each token to the mean token or to the class token.

    Attributes:
        to: What to compare with.
        of: Which vectors.
        sign: ``-1`` rates unlike tokens high.
    """

    kind: ClassVar[str] = "similarity"

    to: Literal["mean", "cls"] = "mean"
    of: Literal["keys", "values", "features"] = "features"
    sign: Literal[1, -1] = 1

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, self.of, "concat")  # [B, N, D]
        if self.to == "cls":
            anchor = b.slice(x, 1, 0, 1)
        elif cut.valid is None:
            anchor = normalised(b, b.mean(x, 1, keepdim=True))
        else:
            real = b.unsqueeze(b.cast(cut.valid, b.dtype(x)), 2)
            anchor = normalised(b, b.sum(b.mul(x, real), 1, keepdim=True))
        cosine = b.squeeze(b.matmul(x, b.transpose(anchor, 1, 2)), 2)
        return b.mul(cosine, float(self.sign)) if self.sign < 0 else cosine
