"""Relevance of tokens for a text: cosine to the text's vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from tokcc.passes.cut import Cut
from tokcc.passes.features import features, normalised
from tokcc.passes.ordering import LOWEST
from tokcc.passes.piece import Score
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec, Trained

__all__ = ["TextRelevance"]


class TextRelevance(TextGuided, Trained, Score):
    """Cosine of every token to the rows of a text (CDPruner, arXiv:2506.10967; FlashVLM, arXiv:2512.20561).

    Attributes:
        over_rows: How rows are combined.
        sign: ``-1`` rates unlike tokens high: in CLIP's common space the cosine falls with relevance (CDPruner).
        projection: Bring tokens to the text's space first, ``projection.weight`` ``[D, C]`` behind a layer norm
            ``norm.weight``, ``norm.bias`` ``[C]``; these are trained. Without it the text has the tokens' width.
    """

    kind: ClassVar[str] = "text_relevance"

    over_rows: Literal["mean", "max"] = "mean"
    sign: Literal[1, -1] = 1
    projection: bool = False

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`TextRelevance`."""
        del sizes
        if not self.projection:
            return ()
        return (
            TensorSpec("norm.weight", ("C",)),
            TensorSpec("norm.bias", ("C",), optional=True),
            TensorSpec("projection.weight", ("D", "C")),
        )

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, "features", normalise=False)  # fp32 [B, N, C]
        if self.projection:
            x = self.linear(b, self.normed(b, x, "norm", "layer", 1e-5), "projection")  # [B, N, D]
        width = b.shape(x)[2]
        rows, true, count = self.read_text(cut, width)
        cosine = b.matmul(normalised(b, x), b.transpose(normalised(b, rows), 1, 2))  # [B, N, T]
        there = b.unsqueeze(true, 1)
        if self.over_rows == "max":
            score = b.amax(b.where(there, cosine, LOWEST), 2)
        else:
            score = b.div(b.sum(b.where(there, cosine, 0.0), 2), count)
        return b.mul(score, -1.0) if self.sign < 0 else score
