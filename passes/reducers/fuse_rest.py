"""Keep the selected tokens and fuse all others into one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import LOWEST, masked, topk
from tokcc.passes.piece import Reducer
from tokcc.passes.taking import take

__all__ = ["FuseRest"]

aten = torch.ops.aten


class FuseRest(Reducer):
    """Append one token, the score-weighted sum of the dropped ones (EViT, arXiv:2202.07800, eq. 4).

    Attributes:
        normalise: Divide by the sum of the weights; the published form does not.
    """

    kind: ClassVar[str] = "fuse_rest"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    normalise: bool = False

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`FuseRest`."""
        b = cut.b
        if chosen.score is None or len(b.shape(chosen.index)) == 1:
            cut.ctx.fail("`fuse_rest` needs a selection by score", help="use `select: {kind: topk}` with a score")
        if chosen.by_input and not self._has_room(cut, chosen):
            cut.ctx.fail(
                "the input decides how many tokens stay, and there is no slot for the fused one",
                needed="a static number of tokens, and a budget that leaves fewer slots than there are tokens",
                help="use `reduce: {kind: drop}`, or a smaller budget and static sizes",
            )
        dtype, real = b.dtype(chosen.score), None if chosen.valid is None else cut.present()
        # 1 where dropped. An empty slot keeps nothing: what it points at is fused like the rest.
        gone = b.call(aten.ones_like.default, chosen.score) if chosen.valid is None else b.cast(real, dtype)
        kept = b.full([cut.batch.size, chosen.size], 0.0, dtype, cut.x)
        if chosen.valid is not None:
            kept = b.cast(b.where(chosen.valid, 0.0, b.gather(gone, 1, chosen.index)), dtype)
        gone = b.scatter(gone, 1, chosen.index, kept)  # [B, N]
        weights = b.mul(chosen.score, gone)
        if self.normalise:
            weights = b.div(weights, b.clamp_min(b.sum(weights, 1, keepdim=True), 1e-12))
        fused = b.matmul(b.unsqueeze(b.cast(weights, b.dtype(cut.x)), 1), cut.x)  # [B, 1, C]
        # There is a fused token only where something was dropped.
        some = b.min_sizes(1, b.sub_sizes(cut.tokens, chosen.size))
        child.size = b.add_sizes(chosen.size, some)
        child.ascending = False
        child.base = cut.x
        child.suffix = 0
        valid = None
        if chosen.valid is not None:
            dropped = b.compare("gt", b.sum(gone, 1, keepdim=True), 0.5)
            valid = b.cat([chosen.valid, b.slice(dropped, 1, 0, some)], 1)
        # The fused token is the last of the real ones; empty slots stay behind it.
        order = None if valid is None else topk(b, b.cast(valid, torch.int32), child.size, in_order=False)

        def joined(own: Any, extra: Any) -> Any:
            both = b.cat([own, b.slice(extra, 1, 0, some)], 1)
            return both if order is None else take(cut, both, order)

        child.index = joined(*self._places(cut, chosen, gone))
        child.valid = None if valid is None else b.gather(valid, 1, order)
        if cut.space.weight is not None:
            own = take(cut, cut.space.weight, chosen.index)
            rest = b.sum(b.mul(b.cast(cut.space.weight, dtype), gone), 1, keepdim=True)
            child.weight, child.bias = joined(own, b.cast(rest, b.dtype(own))), cut.space.bias
        return joined(take(cut, cut.x, chosen.index), fused)

    def _has_room(self, cut: Cut, chosen: Kept) -> bool:
        sizes = (chosen.size, cut.tokens)
        return all(isinstance(size, int) for size in sizes) and bool(chosen.size < cut.tokens)

    def _places(self, cut: Cut, chosen: Kept, gone: Any) -> tuple[Any, Any]:
        """Return where the kept tokens and the fused one stand in side tensors (masks, position bias).

        The fused token stands where the best dropped one stood. It must be a real token there, since masks are read by
        it, and no other slot may stand there, since restoring writes by it.
        """
        b = cut.b
        rating = masked(cut, chosen.score)
        taken = b.full([cut.batch.size, chosen.size], 2 * LOWEST, torch.float32, cut.x)
        free = topk(b, b.scatter(rating, 1, chosen.index, taken), 1, in_order=False)  # [B, 1]
        if chosen.valid is None:
            return chosen.index, free
        # Empty slots stand at dropped tokens too: one that stands at the best takes the free place instead.
        rating = b.where(b.compare("gt", gone, 0.5), rating, 2 * LOWEST)
        best = topk(b, rating, 1, in_order=False)
        place = b.where(b.compare("gt", b.gather(rating, 1, best), LOWEST), best, free)
        clash = b.compare("eq", chosen.index, place)
        return b.where(clash, free, chosen.index), place
