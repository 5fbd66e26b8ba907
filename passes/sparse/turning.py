"""Keys before their positions turned them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["Turn", "turned_back"]

Turn = Callable[[Any, Any], Any]
"""Turns ``[B, heads, N, D]`` to positions int64 ``[B, N]``."""


def turned_back(b: Builder, turn: Turn, x: Any, places: Any) -> Any:
    """Return what a model has turned as it was before.

    A model may also stretch what it turns (YaRN): turning twice stretches twice, which is divided out.

    Args:
        b: The builder.
        turn: How it turns.
        x: ``[B, heads, N, D]``, at some positions.
        places: Those, int64 ``[B, N]``.
    """
    back = turn(x, b.sub(b.mul(places, 0), places))
    start = b.full([b.size(x, 0), 1], 0, torch.int64, x)
    ones = b.full([b.size(x, 0), int(b.shape(x)[1]), 1, b.size(x, 3)], 1.0, b.dtype(x), x)
    stretch = turn(ones, start)
    return b.div(back, b.mul(stretch, stretch))
