"""What trained gates make of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pooling import Pool
from tokcc.passes.cache.pooling import pooled as pool_of

__all__ = ["by_head", "pooled"]


def by_head(b: Builder, x: Any, weight: Any) -> Any:
    """Apply a linear layer of each head, ``[heads, in, out]``, to ``[B, heads, N, in]``."""
    return b.matmul(x, b.unsqueeze(b.cast(weight, b.dtype(x)), 0))


def pooled(b: Builder, key: Any, real: Any, pools: Sequence[Pool]) -> Any:
    """Return some numbers for each channel of the keys of each block, ``[B, H, M, len(pools) * D]``; 0 for no key.

    Args:
        b: The builder.
        key: ``[B, H, M, block, D]``.
        real: bool ``[B, M, block]``: which keys are there.
        pools: Which numbers, beside each other.
    """
    return b.cat([pool_of(b, key, real, pool) for pool in pools], 3)
