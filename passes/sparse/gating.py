"""What trained gates make of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from tokcc.ir.builder import Builder

__all__ = ["Pool", "by_head", "pooled"]

Pool = Literal["max", "min", "mean"]


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
    kind, counts = b.dtype(key), b.sum(b.cast(real, torch.float32), 2)
    there = b.unsqueeze(b.unsqueeze(b.compare("gt", counts, 0), 1), 3)
    wide = b.unsqueeze(b.unsqueeze(real, 1), 4)  # [B, 1, M, block, 1]
    many = b.unsqueeze(b.unsqueeze(b.cast(b.clamp_min(counts, 1.0), kind), 1), 3)
    far = float(torch.finfo(kind).max)
    made = []
    for pool in pools:
        if pool == "mean":
            made.append(b.div(b.sum(b.where(wide, key, 0.0), 3), many))
            continue
        filled = b.where(wide, key, -far if pool == "max" else far)
        made.append(b.where(there, b.amax(filled, 3) if pool == "max" else b.amin(filled, 3), 0.0))
    return b.cat(made, 3)
