"""The best-scored candidates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import LOWEST, PROTECTED
from tokcc.passes.prompt.cut import PromptCut, Selected
from tokcc.passes.prompt.piece import PromptSelector

__all__ = ["TopK"]


class TopK(PromptSelector):
    """Keep the candidates with the largest score, in the order of the prompt; ties to the earlier token."""

    kind: ClassVar[str] = "topk"

    def select(self, cut: PromptCut, score: Any) -> Selected:
        """See :class:`TopK`."""
        b = cut.b
        rating = b.where(cut.candidates, b.cast(score, torch.float32), PROTECTED)
        if cut.padding_first:
            rating = b.where(cut.real, rating, LOWEST)
        return Selected(b.call(torch.ops.tokcc.topk_select.default, rating, cut.kept, True), cut.kept, score)
