"""Attention within a text; a fixed place afterwards."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["PromptSum"]


class PromptSum(CacheScore):
    """The attention received from a text, and then the entry at a fixed place goes (Elastic Cache, arXiv:2407.18121).

    A call with more than one token is text: its column sums, mean over all heads, give one set per layer. A single
    token pushes out the entry that has ``offset`` newer ones behind it. With a fixed capacity that is the same place in
    every step: the text before it is frozen, and the newest ``offset`` entries are a sliding window.

    Attributes:
        offset: Newer entries behind the one that goes.
    """

    kind: ClassVar[str] = "prompt_sum"

    offset: int = Field(default=25, ge=1)

    def held(self) -> int:
        """The sliding window."""
        return self.offset

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`PromptSum`."""
        b = cut.b
        text = b.mean(cut.received, 1, keepdim=True)  # [B, 1, L]
        generated = b.mul(b.cast(b.compare("eq", cut.age(), self.offset), torch.float32), -1.0)  # [L]
        return b.where(cut.is_text(), text, generated)
