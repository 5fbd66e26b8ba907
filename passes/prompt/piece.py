"""The three kinds of pieces of prompt steps."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

from tokcc.passes.piece import Piece
from tokcc.passes.prompt.cut import PromptCut, Remaining, Selected

__all__ = ["PromptReducer", "PromptScore", "PromptSelector"]


class PromptScore(Piece):
    """Rates tokens of the prompt.

    Attributes:
        text_rows: Reads the rows of the text, whose number must be known when compiling.
        reads_old: Parts of the layer's cache of which it reads old entries, see :attr:`PromptCut.old`.
    """

    text_rows: ClassVar[bool] = False
    reads_old: ClassVar[tuple[str, ...]] = ()

    @property
    def counts_text(self) -> bool:
        """Whether it reads the rows of the text with these parameters."""
        return self.text_rows

    def emit(self, cut: PromptCut) -> Any:
        """Return fp32 ``[B, N]``, larger = more important; what it says of tokens that are no candidates is ignored."""
        raise NotImplementedError


class PromptSelector(Piece):
    """Chooses which candidates stay.

    Attributes:
        counts: The number of candidates must be known when compiling.
    """

    wants_score: ClassVar[bool] = True
    counts: ClassVar[bool] = False

    def select(self, cut: PromptCut, score: Any) -> Selected:
        """Return what stays: all tokens that are no candidates, and some that are."""
        raise NotImplementedError


class PromptReducer(Piece):
    """Makes the shorter stream.

    Attributes:
        refills: Tokens that go are not gone: the caches of the layers behind the cut take old entries for them.
    """

    refills: ClassVar[bool] = False

    @property
    def ratio(self) -> Fraction:
        """With `refills`, the share of tokens with old entries that is computed anew."""
        return Fraction(1)

    def added(self, pruned: int) -> int:
        """Return how many tokens are put in the place of those that go."""
        del pruned
        return 0

    def reduce(self, cut: PromptCut, chosen: Selected) -> Remaining:
        """Return what is left. ``chosen`` has K tokens, added ones excepted."""
        raise NotImplementedError
