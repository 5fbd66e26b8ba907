"""Keep the best tokens, condense the next ones to a few centres, fuse the rest into one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Tiered
from tokcc.passes.piece import Reducer
from tokcc.passes.taking import take

__all__ = ["Condense"]

aten = torch.ops.aten


class Condense(Reducer):
    """Coreset of the second tier, score-weighted sum of the rest (TCA, arXiv:2410.14729, section 3.2).

    Centres are picked by k-centre greedy: the best scored token, then again and again the one that is farthest from all
    centres. Every other token of the tier joins its nearest centre with the weight 1 / distance; a centre counts 1, and
    so does a copy of it. The rest becomes one token, weighted by its scores without normalising. The output is
    ``[protected, first tier | centres | fused]``.

    Attributes:
        centres: How many.
    """

    kind: ClassVar[str] = "condense"
    takes: ClassVar[tuple[type, ...]] = (Tiered,)

    centres: int = Field(default=4, ge=1)

    def reduce(self, cut: Cut, chosen: Tiered, child: TokenSpace) -> Any:
        """See :class:`Condense`."""
        b = cut.b
        if cut.last:
            cut.ctx.fail("`condense` cannot protect tokens at the end", help="leave out `protect.last`")
        count = min(self.centres, b.size(chosen.middle, 1))
        parts, places, masses = [take(cut, cut.x, chosen.best.index)], [chosen.best.index], []
        weight = None if cut.space.weight is None else b.cast(cut.space.weight, torch.float32)
        if weight is not None:
            masses.append(take(cut, weight, chosen.best.index))
        if count:
            x = b.cast(take(cut, cut.x, chosen.middle), torch.float32)  # [B, M, C]
            picks, distances = self._centres(cut, x, count)
            share, member = self._shares(cut, picks, distances)  # [B, C, M]
            parts.append(b.cast(b.matmul(share, x), b.dtype(cut.x)))
            places.append(b.gather(chosen.middle, 1, picks))
            if weight is not None:
                own = b.unsqueeze(take(cut, weight, chosen.middle), 2)
                masses.append(b.squeeze(b.matmul(member, own), 2))
        if b.size(chosen.rest, 1):
            score = b.cast(take(cut, chosen.score, chosen.rest), b.dtype(cut.x))
            parts.append(b.matmul(b.unsqueeze(score, 1), take(cut, cut.x, chosen.rest)))  # [B, 1, C]
            places.append(b.slice(chosen.rest, 1, 0, 1))  # where the best of the rest stood
            if weight is not None:
                masses.append(b.sum(take(cut, weight, chosen.rest), 1, keepdim=True))
        reduced = b.cat(parts, 1)
        child.size = b.size(reduced, 1)
        child.index, child.ascending, child.base, child.suffix = b.cat(places, 1), False, cut.x, 0
        if weight is not None:
            child.weight, child.bias = b.cast(b.cat(masses, 1), b.dtype(cut.x)), cut.space.bias
        return reduced

    def _centres(self, cut: Cut, x: Any, count: int) -> tuple[Any, list[Any]]:
        """Return the picks int64 ``[B, count]`` and the distance of every token to each of them, ``[B, M]``."""
        b = cut.b
        picks = [b.full([cut.batch.size, 1], 0, torch.int64, cut.x)]
        distances: list[Any] = []
        nearest: Any = None
        for number in range(count):
            centre = b.call(torch.ops.tokcc.gather_tokens.default, x, picks[-1], 1, 0)  # [B, 1, C]
            # Differences, not a product: the distance of a token to itself is exactly 0.
            apart = b.sub(x, centre)
            distances.append(b.sqrt(b.sum(b.mul(apart, apart), 2)))
            nearest = distances[-1] if nearest is None else b.call(aten.minimum.default, nearest, distances[-1])
            if number + 1 < count:
                picks.append(b.argmax(nearest, 1, keepdim=True))
        return b.cat(picks, 1), distances

    def _shares(self, cut: Cut, picks: Any, distances: list[Any]) -> tuple[Any, Any]:
        """Return the weights of each centre's members, and who they are, both fp32 ``[B, count, M]``."""
        b = cut.b
        apart = b.call(aten.stack.default, distances, 1)  # [B, count, M]
        nearest = b.argmax(b.mul(apart, -1.0), 1)  # [B, M]
        place = b.arange(b.size(apart, 2), cut.x)
        own = b.compare("eq", b.unsqueeze(picks, 2), place)  # [B, count, M]: the centres themselves
        joins = b.compare("eq", b.unsqueeze(nearest, 1), b.unsqueeze(b.arange(len(distances), cut.x), 1))
        # A centre stays in its own cluster, also where it is a copy of another one.
        centre = b.compare("gt", b.amax(b.cast(own, torch.float32), 1, keepdim=True), 0.5)  # [B, 1, M]
        member = b.cast(b.logical_or(own, b.logical_and(joins, b.logical_not(centre))), torch.float32)
        zero = b.compare("eq", apart, 0.0)
        weight = b.div(member, b.where(zero, 1.0, apart))
        return b.div(weight, b.sum(weight, 2, keepdim=True)), member
