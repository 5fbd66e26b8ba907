"""Half by importance, half by repeated thinning of near-duplicates."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import ascending, masked, topk
from tokcc.passes.piece import Selector

__all__ = ["Thinning"]


class Thinning(Selector):
    """Keep the most important tokens, and of the others those that survive rounds of bipartite thinning.

    The others stand in a list by falling score. A round compares its even members with the odd ones and deletes the
    even ones of largest best similarity; then even members by falling similarity stand before the odd ones (VisPruner,
    arXiv:2412.01818). The number of rounds follows from the sizes, so the program is unrolled.

    Attributes:
        important: Share of the budget that is kept by score alone, rounded down.
        per_round: Tokens that a round deletes.
        of: Vectors that similarity (cosine) is measured on.
        resort: Put the list back in sequence order before each round, as some ports do.
    """

    kind: ClassVar[str] = "thinning"

    important: float = Field(default=0.5, ge=0.0, le=1.0)
    per_round: int = Field(default=8, ge=1)
    of: FeatureKind = "features"
    resort: bool = False

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`Thinning`."""
        b, size = cut.b, cut.candidates
        kept = cut.count.kept(b, size, cut.initial_candidates)
        if cut.valid is not None or not isinstance(size, int) or not isinstance(kept, int):
            cut.ctx.fail(
                "the number of rounds of thinning depends on the number of tokens, which is not fixed here",
                help="export the model with a fixed number of tokens and without a padding mask",
            )
        best = math.floor(Fraction(str(self.important)) * kept)
        order = topk(b, cut.inner(masked(cut, score)), size, in_order=False)  # [B, M] by falling score
        parts = [b.slice(order, 1, 0, best)] if best else []
        if best < kept:
            parts.append(self._thinned(cut, b.slice(order, 1, best), size - best, kept - best))
        index = ascending(b, b.cat(parts, 1))
        return Kept(cut.with_protected(index), None, True, kept + cut.first + cut.last, score)

    def _thinned(self, cut: Cut, members: Any, length: int, wanted: int) -> Any:
        """Thin ``[B, length]`` candidates down to ``[B, wanted]``."""
        b = cut.b
        x = cut.inner(features(cut, self.of, "concat"))  # [B, M, D]
        cosine = b.matmul(x, b.transpose(x, 1, 2))  # [B, M, M]
        while length > wanted:
            if self.resort:
                members = ascending(b, members)
            half = (length + 1) // 2
            gone = min(self.per_round, length - wanted, half)
            even, odd = b.slice(members, 1, 0, None, 2), b.slice(members, 1, 1, None, 2)
            rows = self._rows(cut, cosine, even)  # [B, half, M]
            between = self._rows(cut, b.transpose(rows, 1, 2), odd)  # [B, length - half, half]
            falling = topk(b, b.amax(between, 1), half, in_order=False)
            members = b.cat([b.gather(even, 1, b.slice(falling, 1, gone)), odd], 1)
            length -= gone
        return members

    @staticmethod
    def _rows(cut: Cut, table: Any, index: Any) -> Any:
        return cut.b.call(torch.ops.tokcc.gather_tokens.default, table, index, 1, 0)
