"""Evict what was not kept."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.cache.piece import CacheReducer

__all__ = ["Evict"]


class Evict(CacheReducer):
    """Keep the chosen entries as they are."""

    kind: ClassVar[str] = "drop"

    def reduce(self, cut: CacheCut, retained: Retained) -> tuple[Any, Any]:
        """See :class:`Evict`."""
        op = torch.ops.tokcc.gather_slots.default
        return cut.b.call(op, cut.key, retained.index), cut.b.call(op, cut.value, retained.index)
