"""A score that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.ordering import LOWEST, around
from tokcc.passes.piece import Score
from tokcc.passes.subset import candidates_valid

__all__ = ["Given"]


class Given(Guided, Score):
    """A number for each candidate, such as the entropy of its pixels, which the engine reads.

    Attributes:
        name: Of the input, fp32 ``[B, N]``: the tokens of the unreduced model without the protected ones.
        softmax: Over the candidates.
    """

    kind: ClassVar[str] = "given"

    name: str = Field(default="importance", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    softmax: bool = False

    def inputs(self) -> Sequence[EngineInput]:
        """Return the score."""
        return (EngineInput(self.name, ("B", "N"), "how important each token is, without the special ones"),)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b = cut.b
        if cut.space.reduced:
            cut.ctx.fail("the given score is of all tokens, and an earlier step has removed some",
                         help="put the step that reads it first")  # fmt: skip
        rating = self.read(b, self.name, {"B": cut.batch.size, "N": cut.candidates}, cut.x)
        if self.softmax:
            valid = candidates_valid(cut)
            rating = b.softmax(rating if valid is None else b.where(valid, rating, LOWEST), 1)
        return around(cut, rating)
