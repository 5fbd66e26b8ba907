"""What all matchings end with."""

from __future__ import annotations

from typing import Any


from tokcc.passes.cut import Cut, Matched
from tokcc.passes.ordering import valid_first

__all__ = ["finish_matching"]


def finish_matching(
    cut: Cut, keep: Any, source: Any, slot: Any, first: Any, size: Any, merges: Any, *, in_order: bool = False
) -> Matched:
    """Make a :class:`Matched`; with padding, weigh and compact it so that each sample gets what it gets alone.

    Args:
        cut: The cut.
        keep: int64 ``[B, K]``.
        source: int64 ``[B, R]``.
        slot: int64 ``[B, R]``.
        first: Smallest slot.
        size: K.
        merges: With padding: bool ``[B, R]``, which sources really merge; the others count nothing.
        in_order: Output order follows the sequence.
    """
    b = cut.b
    valid = cut.valid
    if valid is None:
        return Matched(keep, source, slot, first, size, ascending=in_order)
    dtype = b.dtype(cut.x)
    weight = cut.space.weight
    weight = b.cast(valid, dtype) if weight is None else b.mul(b.cast(weight, dtype), b.cast(valid, dtype))
    if merges is not None:
        # A source that does not merge is padding: it must already weigh nothing, whatever its slot.
        own = b.mul(b.gather(weight, 1, source), b.cast(merges, dtype))
        weight = b.scatter(weight, 1, source, own)
    kept_valid = b.gather(valid, 1, keep)
    order = valid_first(b, kept_valid, size)  # [B, K] output position -> old position
    position = b.scatter(order, 1, order, cut.per_sample(b.arange(size, cut.x)))  # inverse
    return Matched(
        keep=b.gather(keep, 1, order),
        source=source,
        slot=b.gather(position, 1, slot),
        first=0,
        size=size,
        valid=b.gather(kept_valid, 1, order),
        weight=weight,
        ascending=in_order,
    )


