"""Drop what was not selected."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.passed import passed_over
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.fuse_rest import FuseRest
from tokcc.passes.taking import take

__all__ = ["Drop"]


class Drop(Reducer):
    """The selected tokens stay as they are; the others are gone.

    Attributes:
        fuse_rest: Append one token made of the others, as the reducer `fuse_rest` does with its defaults.
        align: What a state that runs over the tokens later does at a dropped one: ``none``: nothing; ``gap``: it decays
            as it does at the next kept one, and nothing is added to it.
    """

    kind: ClassVar[str] = "drop"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    fuse_rest: bool = False
    align: Literal["none", "gap"] = "none"

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Drop`."""
        if self.fuse_rest:
            if self.align != "none":
                cut.ctx.fail(
                    "a fused token has no place in a sequence, so states cannot decay over dropped ones",
                    help="use `align: none`, or leave `fuse_rest` out",
                )
            return FuseRest().reduce(cut, chosen, child)
        child.size, child.index, child.valid = chosen.size, chosen.index, chosen.valid
        child.ascending = chosen.ascending
        child.sequence = chosen.ascending or chosen.middle is not None
        child.base = cut.x
        if self.align == "gap":
            child.passed = passed_over(cut, chosen, child)
        if cut.space.weight is not None:
            child.weight, child.bias = take(cut, cut.space.weight, chosen.index), cut.space.bias
        return take(cut, cut.x, chosen.index)
