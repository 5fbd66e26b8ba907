"""Norm of the keys."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["KeyNorm"]


class KeyNorm(CacheScore):
    """Keys of small norm are important (arXiv:2406.11430): ``-||k||``."""

    kind: ClassVar[str] = "key_norm"
    by_key_norm: ClassVar[bool] = True

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`KeyNorm`."""
        b = cut.b
        key = b.cast(cut.key, torch.float32)
        return b.mul(b.sqrt(b.sum(b.mul(key, key), 3)), -1.0)
