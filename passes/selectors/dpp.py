"""Greedy selection by the volume that relevant tokens span: a conditional determinantal point process."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.piece import Selector
from tokcc.passes.subset import candidates_valid, kept_set, last_resort, min_max, refuse_padded_share

__all__ = ["Dpp"]


class Dpp(Selector):
    """Pick tokens whose kernel ``L_ij = q_i cos(z_i, z_j) q_j`` has the largest determinant, greedily.

    ``q`` is the score, scaled to ``(s - min + 1e-6) / (max - min + 1e-6)`` (CDPruner, arXiv:2506.10967); the guard in
    the divisor makes a constant score choose by diversity alone. Without a score q is 1. Tokens that the picked ones
    span already are picked by position, when nothing else is left.

    Attributes:
        of: Vectors that similarity (cosine) is measured on.
        sharpness: theta in [0, 1): ``q <- exp(theta / (2 (1 - theta)) q)``; None leaves q as it is.
        scale_over: Extremes of the score over each ``sample``, or, where the batch is the crops of one image, over the
            whole ``batch``.
    """

    kind: ClassVar[str] = "dpp"
    wants_score: ClassVar[bool] = False

    of: FeatureKind = "features"
    sharpness: float | None = Field(default=None, ge=0.0, lt=1.0)
    scale_over: Literal["sample", "batch"] = "sample"

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Dpp`."""
        b = cut.b
        refuse_padded_share(cut)
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        x = cut.inner(features(cut, self.of, "concat"))  # [B, M, D]
        # Exactly one: rounding must not decide between tokens of equal quality.
        place = b.arange(cut.candidates, cut.x)
        same = b.compare("eq", b.unsqueeze(place, 1), b.unsqueeze(place, 0))  # [M, M]
        kernel = b.where(same, 1.0, b.matmul(x, b.transpose(x, 1, 2)))  # [B, M, M]
        if score is not None:
            own = cut.inner(b.cast(score, torch.float32))
            quality = min_max(b, own, candidates_valid(cut), floor=1e-6, over=self.scale_over)
            if self.sharpness is not None:
                quality = b.exp(b.mul(quality, self.sharpness / (2.0 * (1.0 - self.sharpness))))
            kernel = b.mul(b.mul(kernel, b.unsqueeze(quality, 2)), b.unsqueeze(quality, 1))
        unary = last_resort(cut, b.squeeze(b.slice(kernel, 1, 0, 1), 1))
        return kept_set(cut, b.call(torch.ops.tokcc.dpp_select.default, kernel, unary, kept), kept)
