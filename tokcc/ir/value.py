"""Values with typed axes, as the axis rules see them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokcc.ir.space import Axis, Factor, TokenSpace

__all__ = ["Value", "untagged"]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program that is being built, with the meaning of its axes.

    Attributes:
        handle: The value of the builder in use.
        axes: One product of factors per axis.
        old: The shape in the unreduced graph: ints or ``SymInt``.
        totals: Reduced spaces that were summed away in this value: a sum over kept tokens is only a sum over all tokens
            once it is divided by a count of the same tokens.
        side: False for values that come from the residual stream, True for masks, tables and other side tensors.
    """

    handle: Any
    axes: tuple[Axis, ...]
    old: tuple[Any, ...]
    totals: frozenset[TokenSpace] = frozenset()
    side: bool = False

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.old)

    @property
    def spaces(self) -> set[TokenSpace]:
        """The token spaces of all axes, the batch excluded."""
        return {f.space for axis in self.axes for f in axis if f.space is not None and not f.space.is_batch}

    @property
    def tagged(self) -> bool:
        """True when an axis carries a space (the batch included)."""
        return any(f.space is not None for axis in self.axes for f in axis)

    @property
    def reduced(self) -> bool:
        """True when an axis carries a reduced space, or a reduced space was summed away."""
        return bool(self.totals) or any(space.reduced for space in self.spaces)

    def axis_of(self, space: TokenSpace) -> int | None:
        """Return the axis that is exactly ``space``, or None."""
        for position, axis in enumerate(self.axes):
            if len(axis) == 1 and axis[0].space is space:
                return position
        return None

    def batch_axis(self) -> int | None:
        """Return the axis that is exactly the batch, or None."""
        for position, axis in enumerate(self.axes):
            if len(axis) == 1 and axis[0].space is not None and axis[0].space.is_batch:
                return position
        return None

    def having(self, **changes: Any) -> Value:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)


def untagged(handle: Any, old: tuple[Any, ...]) -> Value:
    """Return a value whose axes carry no space."""
    axes = tuple(() if isinstance(size, int) and size == 1 else (Factor(None, size),) for size in old)
    return Value(handle, axes, old, side=True)
