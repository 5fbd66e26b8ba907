"""Greedy selection by coverage of a text and of the image itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import features, normalised
from tokcc.passes.ordering import LOWEST
from tokcc.passes.piece import Selector
from tokcc.passes.subset import candidates_valid, kept_set, last_resort, refuse_padded_share
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec, Trained, linear_specs

__all__ = ["Coverage"]


class Coverage(TextGuided, Trained, Selector):
    """Pick the tokens that cover the words of a text and all tokens of the image best (MMTok, arXiv:2508.18264).

    Facility location over the rows ``softmax_j(cos(w_i, z_j) / t_w) / m`` of the text's m vectors and
    ``share * softmax_j(cos(x_i, x_j) / t_x) / M`` of the M candidates: what is maximised is the sum over rows of the
    largest entry at a picked token.

    Attributes:
        text_temperature: t_w.
        image_temperature: t_x.
        image_share: Weight of the image's rows.
        projection: Tokens are brought to the text's space first, ``z = x W^T + c`` with ``projection.weight``
            ``[D, C]``; the tensors are trained. Without it the text has the tokens' width.
    """

    kind: ClassVar[str] = "coverage"
    wants_score: ClassVar[bool] = False

    text_temperature: float = Field(default=0.02, gt=0.0)
    image_temperature: float = Field(default=0.2, gt=0.0)
    image_share: float = Field(default=0.5, ge=0.0)
    projection: bool = False

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Coverage`."""
        del sizes
        return linear_specs("projection", "D", "C") if self.projection else ()

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Coverage`."""
        del score
        b = cut.b
        refuse_padded_share(cut)
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        x = cut.inner(features(cut, "features", normalise=False))  # fp32 [B, M, C]
        z = normalised(b, self.linear(b, x, "projection")) if self.projection else normalised(b, x)
        x = normalised(b, x)
        table = b.cat([self._text_rows(cut, z), self._image_rows(cut, x)], 1)  # [B, T + M, M]
        unary = last_resort(cut, b.squeeze(b.slice(x, 2, 0, 1), 2))
        return kept_set(cut, b.call(torch.ops.tokcc.cover_select.default, table, unary, kept), kept)

    def _text_rows(self, cut: Cut, z: Any) -> Any:
        """``[B, T, M]``; rows that are not true ones are 0."""
        b = cut.b
        words, true, count = self.read_text(cut, b.shape(z)[2])
        share = self._shares(cut, b.matmul(normalised(b, words), b.transpose(z, 1, 2)), self.text_temperature)
        share = b.where(b.unsqueeze(true, 2), share, 0.0)
        return b.div(share, b.unsqueeze(count, 2))

    def _image_rows(self, cut: Cut, x: Any) -> Any:
        """``[B, M, M]``; rows of padding are 0."""
        b = cut.b
        share = self._shares(cut, b.matmul(x, b.transpose(x, 1, 2)), self.image_temperature)
        valid = candidates_valid(cut)
        if valid is None:
            size = cut.candidates
            scaled = b.mul(share, self.image_share)
            return b.div(scaled, float(size)) if isinstance(size, int) else b.div(scaled, size)
        real = b.cast(valid, torch.float32)
        weight = b.div(b.mul(real, self.image_share), b.sum(real, 1, keepdim=True))
        return b.mul(share, b.unsqueeze(weight, 2))

    def _shares(self, cut: Cut, cosine: Any, temperature: float) -> Any:
        b = cut.b
        logits = b.mul(cosine, 1.0 / temperature)
        valid = candidates_valid(cut)
        return b.softmax(logits if valid is None else b.where(b.unsqueeze(valid, 1), logits, LOWEST), 2)
