"""Numbers that stand for the keys of blocks."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokcc.ir.builder import Builder

__all__ = ["Pool", "pooled"]

Pool = Literal["max", "min", "mean"]


def pooled(b: Builder, key: Any, real: Any, pool: Pool) -> Any:
    """Return a number for each channel of the keys of each block, ``[B, H, M, D]``; 0 for a block of no key.

    Args:
        b: The builder.
        key: ``[B, H, M, block, D]``.
        real: bool ``[B, M, block]``: which keys are there.
        pool: Which number.
    """
    kind, counts = b.dtype(key), b.sum(b.cast(real, torch.float32), 2)
    wide = b.unsqueeze(b.unsqueeze(real, 1), 4)  # [B, 1, M, block, 1]
    if pool == "mean":
        many = b.cast(b.clamp_min(counts, 1.0), kind)
        return b.div(b.sum(b.where(wide, key, 0.0), 3), b.unsqueeze(b.unsqueeze(many, 1), 3))
    far = float(torch.finfo(kind).max)
    filled = b.where(wide, key, -far if pool == "max" else far)
    there = b.unsqueeze(b.unsqueeze(b.compare("gt", counts, 0), 1), 3)
    return b.where(there, b.amax(filled, 3) if pool == "max" else b.amin(filled, 3), 0.0)
