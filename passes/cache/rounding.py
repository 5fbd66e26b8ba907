"""Numbers on a grid of few steps, and their codes packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["Grid", "grid_between", "pack", "round_to", "unpack", "values_of"]

aten = torch.ops.aten

_LEAST = 2.0**-20
"""Smallest step: where all numbers are equal. fp16 holds it, as a subnormal."""


@dataclass(frozen=True)
class Grid:
    """The numbers ``low + code * step``; both fp16 and broadcast against the numbers."""

    step: Any
    low: Any


def grid_between(b: Builder, low: Any, high: Any, bits: int) -> Grid:
    """Return the grid of ``2 ** bits`` numbers from ``low`` to ``high``, both fp32.

    What is stored is rounded to fp16 first, and codes are counted on that grid: the rounding of the grid costs nothing
    but its ends.
    """
    step = b.clamp_min(b.div(b.sub(high, low), float(2**bits - 1)), _LEAST)
    return Grid(b.cast(step, torch.float16), b.cast(low, torch.float16))


def round_to(b: Builder, x: Any, grid: Grid, bits: int) -> Any:
    """Return the codes of fp32 numbers, as fp32 from 0 to ``2 ** bits - 1``; halves to even."""
    step, low = (b.cast(part, torch.float32) for part in (grid.step, grid.low))
    place = b.call(aten.round.default, b.div(b.sub(x, low), step))
    return b.call(aten.clamp.default, place, 0.0, float(2**bits - 1))


def values_of(b: Builder, codes: Any, grid: Grid) -> Any:
    """Return the fp32 numbers of fp32 codes."""
    step, low = (b.cast(part, torch.float32) for part in (grid.step, grid.low))
    return b.add(b.mul(codes, step), low)


def pack(b: Builder, codes: Any, bits: int) -> Any:
    """Pack codes of 8, 4 or 2 bits along the last axis.

    Of ``W`` codes, ``n = 8 / bits`` go into each of ``W / n`` bytes: byte ``j`` holds the codes ``j``, ``j + W / n``,
    ``j + 2 W / n``, ..., the first in its lowest bits. So unpacking puts whole parts behind each other and never
    interleaves. In fp32, which counts to 255 exactly: shifts of bytes are not for every runtime.

    Args:
        b: The builder.
        codes: fp32 ``[..., W]``.
        bits: Of a code.

    Returns:
        uint8 ``[..., W / n]``.
    """
    count = 8 // bits
    width = int(b.shape(codes)[-1]) // count
    axis = len(b.shape(codes)) - 1
    packed = None
    for part in reversed(range(count)):
        own = codes if count == 1 else b.slice(codes, axis, part * width, (part + 1) * width)
        packed = own if packed is None else b.add(b.mul(packed, float(2**bits)), own)
    return b.cast(packed, torch.uint8)


def unpack(b: Builder, packed: Any, bits: int) -> Any:
    """Return the codes that :func:`pack` packed, as fp32."""
    rest = b.cast(packed, torch.float32)
    parts = []
    for _ in range(8 // bits - 1):
        # By a power of two: exact.
        above = b.call(aten.floor.default, b.mul(rest, 2.0**-bits))
        parts.append(b.sub(rest, b.mul(above, float(2**bits))))
        rest = above
    return b.cat([*parts, rest], len(b.shape(packed)) - 1)
