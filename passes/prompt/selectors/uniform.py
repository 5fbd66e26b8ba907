"""Evenly spaced candidates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.prompt.cut import PromptCut, Selected
from tokcc.passes.prompt.piece import PromptSelector
from tokcc.passes.prompt.selectors.topk import TopK

__all__ = ["Uniform"]


class Uniform(PromptSelector):
    """Keep candidate ``floor(i * n / K)`` for i = 0..K-1 (ADSC, arXiv:2602.12618); none where K is 0."""

    kind: ClassVar[str] = "uniform"
    wants_score: ClassVar[bool] = False
    counts: ClassVar[bool] = True

    def select(self, cut: PromptCut, score: Any) -> Selected:
        """See :class:`Uniform`."""
        del score
        b = cut.b
        assert cut.present is not None
        assert cut.remaining is not None
        total, kept = cut.present, cut.remaining
        # Candidate j stays when an i with floor(i * n / K) = j exists: when ceil(j * K / n) * n < (j + 1) * K.
        place = cut.rank()
        step = b.call(
            torch.ops.aten.div.Tensor_mode, b.add(b.mul(place, kept), total - 1), total, rounding_mode="floor"
        )
        stays = b.compare("lt", b.mul(step, total), b.mul(b.add(place, 1), kept))
        return TopK().select(cut, b.cast(stays, torch.float32))
