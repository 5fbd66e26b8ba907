"""Smoothing a score along the tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from tokcc.ir.builder import Builder

__all__ = ["Kernel", "Pool", "smoothed"]

aten = torch.ops.aten

Pool = Literal["avg", "max", "none"]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("an even kernel has no middle")
    return value


Kernel = Annotated[int, Field(ge=1), AfterValidator(_odd)]
"""Width of a pool, odd."""


def smoothed(b: Builder, x: Any, pool: Pool, kernel: int) -> Any:
    """Smooth ``[B, N, L]``; a mean divides by the whole kernel at the edges too.

    A kernel without a middle reaches one further to the right.

    Padding holds zeros, which is what stands beyond the edge of a row without padding: for a mean by definition, and
    for a maximum because no score is below zero.
    """
    if pool == "none" or kernel == 1:
        return x
    op = aten.avg_pool2d.default if pool == "avg" else aten.max_pool2d.default
    flat = b.unsqueeze(x, 2)  # [B, N, 1, L]
    found = b.squeeze(b.call(op, flat, [1, kernel], [1, 1], [0, kernel // 2]), 2)
    return found if kernel % 2 else b.slice(found, 2, 1, None)
