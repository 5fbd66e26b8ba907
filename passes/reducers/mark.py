"""Tell which tokens were chosen, or how they are rated, and leave them as they are."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Reducer

__all__ = ["Mark"]


class Mark(Reducer):
    """A number for each token leaves the model beside the tokens, as the output ``<output>.<name>`` ``[B, K]``.

    Tokens that later steps drop take theirs along; merged ones have that of the token they stand for. A step behind
    the encoder, in the language model, can read it.

    Attributes:
        name: Of the output, behind that of the tokens.
        value: ``chosen`` = 1 for the selected candidates and 0 for all others, int64; ``score`` = the step's score,
            fp32.
    """

    kind: ClassVar[str] = "mark"
    takes: ClassVar[tuple[type, ...]] = (Kept,)
    always: ClassVar[bool] = True
    marks: ClassVar[bool] = True

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    value: Literal["chosen", "score"] = "chosen"

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Mark`."""
        b = cut.b
        if self.name in child.facts:
            cut.ctx.fail(f"two steps mark tokens as `{self.name}`", help="give one of them another name")
        if self.value == "score":
            if chosen.score is None:
                cut.ctx.fail("the selection is not made by a score", help="use `select: {kind: topk}` with a score")
            child.facts[self.name] = b.cast(chosen.score, torch.float32)
            return cut.x
        index = chosen.index if len(b.shape(chosen.index)) == 2 else cut.per_sample(chosen.index)
        stop = b.sub_sizes(chosen.size, cut.last)
        index = b.slice(index, 1, cut.first, stop)
        flags = b.full([cut.batch.size, b.size(index, 1)], 1, torch.int64, cut.x)
        if chosen.valid is not None:
            flags = b.cast(b.slice(chosen.valid, 1, cut.first, stop), torch.int64)
        nothing = b.full([cut.batch.size, cut.tokens], 0, torch.int64, cut.x)
        marks = b.scatter(nothing, 1, index, flags)
        if cut.middle is not None:
            # What is protected stands among what is kept, and was not chosen.
            one = [cut.batch.size, 1]
            place = b.full(one, cut.middle, torch.int64, cut.x)
            marks = b.scatter(marks, 1, place, b.full(one, 0, torch.int64, cut.x))
        child.facts[self.name] = marks
        return cut.x
