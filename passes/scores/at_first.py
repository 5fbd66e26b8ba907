"""A score that is computed once, at the step's first layer."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cut import Cut
from tokcc.passes.noted import noted
from tokcc.passes.piece import OtherScore, Score

__all__ = ["AtFirst"]


class AtFirst(Score):
    """What the tokens were worth at the first of the step's layers (Focus-DETR, arXiv:2307.12612): sets are nested.

    Attributes:
        of: The score.
    """

    kind: ClassVar[str] = "at_first"

    of: OtherScore

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return the layers that the score reads."""
        return self.of.layers(layer, num_layers)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        known = noted(cut, (self.kind, id(self)))
        if known is not None:
            rating, now = known
            return now(rating)
        rating = self.of.emit(cut)
        cut.space.notes[self.kind, id(self)] = rating
        return rating
