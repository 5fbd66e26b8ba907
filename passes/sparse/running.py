"""Mean and variance of everything that has been seen, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import prefix, run_from

__all__ = ["Moments", "moments", "through"]


@dataclass(frozen=True)
class Moments:
    """What some parts of a text are like, each in numbers of its own.

    Attributes:
        count: How many tokens, fp32 ``[B, R]``.
        mean: fp32 ``[B, H, R, D]``; any finite numbers for a part of no token.
        variance: Mean square of the differences from it, likewise.
    """

    count: Any
    mean: Any
    variance: Any


def moments(b: Builder, x: Any, real: Any) -> Moments:
    """Return what parts are like.

    Args:
        b: The builder.
        x: ``[B, H, R, N, D]``.
        real: bool ``[B, R, N]``: what counts.
    """
    counted = b.cast(real, torch.float32)
    weight = b.unsqueeze(b.unsqueeze(counted, 1), 4)
    count = b.sum(counted, 2)
    many = b.unsqueeze(b.unsqueeze(b.clamp_min(count, 1.0), 1), 3)
    mean = b.div(b.sum(b.mul(b.cast(x, torch.float32), weight), 3), many)
    off = b.mul(b.sub(b.cast(x, torch.float32), b.unsqueeze(mean, 3)), weight)
    return Moments(count, mean, b.div(b.sum(b.mul(off, off), 3), many))


def through(b: Builder, before: Moments, parts: Moments) -> Moments:
    """Return what everything up to the end of each part is like, that before the first one among it.

    Part after part is joined to what is in front of it by the pooled formula, so that no large numbers cancel out: with
    means apart by ``d`` the sum of squares grows by that of the part and ``d^2 n m / (n + m)``.

    Args:
        b: The builder.
        before: One part, in front of all others.
        parts: R of them in a row.
    """
    rows = b.size(parts.count, 1)
    count = b.cat([before.count, parts.count], 1)  # [B, R + 1]
    total = b.call(torch.ops.aten.cumsum.default, count, 1)

    def wide(x: Any) -> Any:
        return b.unsqueeze(b.unsqueeze(x, 1), 3)

    sums = b.mul(b.cat([before.mean, parts.mean], 2), wide(count))
    mean = b.div(b.call(torch.ops.aten.cumsum.default, sums, 2), wide(b.clamp_min(total, 1.0)))
    earlier, with_part = prefix(b, total, 1, rows), run_from(b, total, 1, 1, rows)
    apart = b.sub(parts.mean, prefix(b, mean, 2, rows))
    share = b.div(b.mul(earlier, parts.count), b.clamp_min(with_part, 1.0))
    grown = b.add(b.mul(parts.variance, wide(parts.count)), b.mul(b.mul(apart, apart), wide(share)))
    squares = b.cat([b.mul(before.variance, wide(before.count)), grown], 2)
    squares = run_from(b, b.call(torch.ops.aten.cumsum.default, squares, 2), 2, 1, rows)
    return Moments(with_part, run_from(b, mean, 2, 1, rows), b.div(squares, wide(b.clamp_min(with_part, 1.0))))
