"""Drop what was not selected."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.fuse_rest import FuseRest
from tokcc.passes.taking import take

__all__ = ["Drop"]


class Drop(Reducer):
    """The selected tokens stay as they are; the others are gone.

    Attributes:
        fuse_rest: Append one token made of the others, as the reducer `fuse_rest` does with its defaults.
    """

    kind: ClassVar[str] = "drop"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    fuse_rest: bool = False

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Drop`."""
        if self.fuse_rest:
            return FuseRest().reduce(cut, chosen, child)
        child.size, child.index, child.valid = chosen.size, chosen.index, chosen.valid
        child.ascending = chosen.ascending
        child.base = cut.x
        if cut.space.weight is not None:
            child.weight, child.bias = take(cut, cut.space.weight, chosen.index), cut.space.bias
        return take(cut, cut.x, chosen.index)
