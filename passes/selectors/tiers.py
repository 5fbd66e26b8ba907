"""A ranking cut in three: what stays, what is condensed, what is fused."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cut import Cut, Kept, Tiered
from tokcc.passes.ordering import ascending, masked, topk
from tokcc.passes.piece import Selector

__all__ = ["Tiers"]


class Tiers(Selector):
    """The best tokens stay, twice as many as are removed are condensed, the removed ones are the rest (TCA).

    Token Condensation as Adaptation (arXiv:2410.14729), as released: of M candidates the budget leaves L, and
    ``m = N - L`` counts the protected tokens too. The best ``L - 2m`` are the first tier, the next ``2m`` the second,
    the last ``M - L`` the rest. Where L is smaller than 2m the first tier is empty.
    """

    kind: ClassVar[str] = "tiers"

    def select(self, cut: Cut, score: Any) -> Tiered:
        """See :class:`Tiers`."""
        b, n = cut.b, cut.candidates
        if cut.valid is not None:
            cut.ctx.fail(
                "three tiers of a ranking have the same sizes in every sample of a padded batch",
                help="use `select: {kind: topk}`",
            )
        left = cut.count.kept(b, n, cut.initial_candidates)
        if not isinstance(n, int) or not isinstance(left, int):
            cut.ctx.fail("tiers of a ranking have fixed sizes", help="make the number of tokens static")
        removed = n - left
        middle = min(2 * (removed + cut.first + cut.last), left) if removed else 0
        best = left - middle
        order = topk(b, cut.inner(masked(cut, score)), n, in_order=False)  # [B, M]
        ranked = b.split(order, 1, [best, middle, removed])
        index = cut.with_protected(ascending(b, ranked[0]))
        kept = Kept(index, None, True, best + cut.first + cut.last, score)
        if cut.first:
            ranked = [b.add(part, cut.first) for part in ranked]
        return Tiered(kept, ranked[1], ranked[2], score)
