"""Which of the entries that wait in a full-precision tail become a block in a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokcc.ir.builder import Builder
from tokcc.passes.cache.storage import Left

__all__ = ["Ripe", "ripe"]


@dataclass(frozen=True)
class Ripe:
    """The oldest entries that wait.

    Attributes:
        count: How many become a block: in the first call all, then `every` or none.
        start: The first of them among the P + S slots.
        stop: Behind the last of them.
    """

    count: Any
    start: Any
    stop: Any


def ripe(b: Builder, left: Left, tail: Any, every: int) -> Ripe:
    """Return what becomes a block.

    Args:
        b: The builder.
        left: The call.
        tail: What waited before it, ``[B, Hkv, waiting, D]``.
        every: Entries of a block behind the first.
    """
    assert left.cut is not None
    waiting = b.add_sizes(b.size(tail, 2), left.new)
    first = b.sub_sizes(1, b.min_sizes(left.past, 1))
    later = b.mul_sizes(b.min_sizes(b.floordiv_sizes(waiting, every), 1), every)
    # In the first call everything waits.
    count = b.max_sizes(b.mul_sizes(first, left.new), b.mul_sizes(b.sub_sizes(1, first), later))
    start = b.sub_sizes(left.cut.total, waiting)
    return Ripe(count, start, b.add_sizes(start, count))
