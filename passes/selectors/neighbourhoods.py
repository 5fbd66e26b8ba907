"""Anchors with their neighbours on the grid, and the best of the others."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.grid import fixed_size, side_of
from tokcc.passes.ordering import HIGHEST, keep_indices, masked, topk
from tokcc.passes.piece import OtherScore, Selector

__all__ = ["Neighbourhoods"]

aten = torch.ops.aten
_CROSS = 5
"""An anchor and its four neighbours."""


class Neighbourhoods(Selector):
    """Keep anchors with their four neighbours, and fill the budget by score (HiPrune, arXiv:2508.00553).

    The candidates are a grid in rows; protected tokens (class token, registers) are no part of it.

    Attributes:
        by: The score that chooses the anchors.
        share: Share of the budget that anchors and neighbours may take: ``round(share * K / 5)`` anchors, halves to
            even.
        width: Tokens in a row of the grid; a square by default.
        wrap: As published: the neighbour of the first token of a row is the last one of the row before, and positions
            beyond the grid are its first or last token. Otherwise only real neighbours count.
    """

    kind: ClassVar[str] = "neighbourhoods"

    by: OtherScore
    share: float = Field(default=0.1, ge=0.0, le=1.0)
    width: int | None = Field(default=None, ge=1)
    wrap: bool = True

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Neighbourhoods`."""
        b, size = cut.b, fixed_size(cut)
        kept: int = cut.count.kept(b, size, cut.initial_candidates)
        rating = masked(cut, score)
        anchors = round(Fraction(str(self.share)) * kept / _CROSS)
        if anchors:
            if anchors * _CROSS > kept:
                cut.ctx.fail(
                    f"{anchors} anchors with their neighbours may be more than {kept} tokens",
                    help="give a smaller `share`, or a larger budget",
                )
            region = self._region(cut, topk(b, cut.inner(masked(cut, self.by.emit(cut))), anchors, in_order=False))
            rating = b.where(region, HIGHEST, rating)
        return keep_indices(cut, rating, kept, score_for_reducer=score)

    def _region(self, cut: Cut, anchors: Any) -> Any:
        """Mark anchors ``[B, A]`` and their neighbours among all tokens, bool ``[B, N]``."""
        b, size = cut.b, cut.candidates
        width = side_of(
            cut,
            self.width,
            parameter="width",
            given=f"with rows of {self.width}",
            needed="the number of tokens in a row",
        )
        column = b.call(aten.remainder.Scalar, anchors, width)
        steps = {-1: b.compare("gt", column, 0), 1: b.compare("lt", column, width - 1), -width: None, width: None}
        places = [anchors]
        for step, inside in steps.items():
            place = b.add(anchors, step)
            if self.wrap:
                places.append(b.call(aten.clamp.default, place, 0, size - 1))
                continue
            if inside is None:
                inside = b.compare("ge", place, 0) if step < 0 else b.compare("lt", place, size)
            places.append(b.where(inside, place, anchors))
        marked = b.add(b.cat(places, 1), cut.first)  # [B, 5A]
        equal = b.compare("eq", b.unsqueeze(marked, 2), cut.positions())  # [B, 5A, N]
        return b.compare("gt", b.amax(b.cast(equal, torch.float32), 1), 0.5)
