"""Tokens whose score passes a threshold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import keep_counted, masked
from tokcc.passes.piece import Selector

__all__ = ["Threshold"]


class Threshold(Selector):
    """Keep the candidates with a score above a threshold: how many stay depends on the input.

    The budget is the number of slots: where more tokens pass, the best scored stay; where fewer do, slots are empty.

    Attributes:
        above: The thresholds: one for each chosen layer, or one for all of them.
    """

    kind: ClassVar[str] = "threshold"

    above: tuple[float, ...] = Field(min_length=1)

    def removes(self, count: Count) -> bool:
        """The scores decide, whatever the budget."""
        del count
        return True

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Threshold`."""
        b = cut.b
        rating = masked(cut, score)
        passes = b.compare("gt", cut.inner(rating), cut.of_stage(self.above, "above"))
        own = b.sum(b.cast(passes, torch.int64), 1)
        slots = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        return replace(keep_counted(cut, rating, slots, own, score), by_input=True)
