"""Difference of keys from their mean."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["KeyDifference"]

_TINY = 1e-12


class KeyDifference(CacheScore):
    """Keys that point elsewhere than the others are important (KeyDiff, arXiv:2504.15364): ``-cos(k, anchor)``.

    The anchor is the mean of the normalised keys in the cache, this call's included, over real slots only. It moves
    with every eviction: how a prompt is cut into calls changes the result.
    """

    kind: ClassVar[str] = "key_difference"

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`KeyDifference`."""
        b = cut.b
        real = b.unsqueeze(b.unsqueeze(b.cast(cut.real, torch.float32), 1), 3)  # [B, 1, L, 1]
        unit = _unit(b, b.cast(cut.key, torch.float32))  # [B, Hkv, L, D]
        total = b.sum(b.mul(unit, real), 2, keepdim=True)
        anchor = _unit(b, b.div(total, b.sum(real, 2, keepdim=True)))  # [B, Hkv, 1, D]
        return b.mul(b.sum(b.mul(unit, anchor), 3), -1.0)


def _unit(b: Builder, x: Any) -> Any:
    """Scale the last axis to length one."""
    return b.div(x, b.clamp_min(b.sqrt(b.sum(b.mul(x, x), 3, keepdim=True)), _TINY))
