"""Newer is better."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["Position"]


class Position(CacheScore):
    """The newest entries stay, next to protected sinks (StreamingLLM, arXiv:2309.17453)."""

    kind: ClassVar[str] = "position"
    keeps_sinks: ClassVar[bool] = False

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`Position`."""
        b = cut.b
        return b.unsqueeze(b.unsqueeze(b.cast(cut.slots(), torch.float32), 0), 0)
