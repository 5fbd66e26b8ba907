"""How many removed tokens stand before each kept one."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept

__all__ = ["passed_over"]

aten = torch.ops.aten


def passed_over(cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
    """Count the tokens of the unreduced model that are gone before each kept one, int64 ``[B, K]``.

    A token that was moved to stay in the middle counts as far as its own place lies between its new neighbours.

    Args:
        cut: The cut.
        chosen: What stays, in the order of the sequence.
        child: Its space, with its index.
    """
    b = cut.b
    if not chosen.ascending and chosen.middle is None:
        cut.ctx.fail(
            "a state cannot decay over dropped tokens where the kept ones are not in the order of the sequence",
            help="keep the order (`select: {kind: topk, order: sequence}`), or use `align: none`",
        )
    places = cut.ctx.index_between(child.root, child)  # [B, K] or [K]
    places = cut.per_sample(places) if len(b.shape(places)) == 1 else places
    if chosen.middle is None:
        return b.sub(places, b.arange(chosen.size, cut.x))
    assert cut.initial_middle is not None
    half = chosen.middle
    others = b.cat([b.slice(places, 1, 0, half), b.slice(places, 1, b.add_sizes(half, 1))], 1)  # [B, K - 1]
    behind = b.cast(b.compare("gt", others, cut.initial_middle), torch.int64)
    gone = b.sub(b.sub(others, behind), b.arange(b.sub_sizes(chosen.size, 1), cut.x))
    # Before the middle token stand as many others as have smaller places; between its neighbours at any rate.
    front = b.sub(b.sum(behind, 1, keepdim=True), b.sub_sizes(chosen.size, 1))  # [B, 1], negative
    own = b.add(front, cut.initial_middle)
    low, high = b.slice(gone, 1, b.sub_sizes(half, 1), half), b.slice(gone, 1, half, b.add_sizes(half, 1))
    own = b.call(aten.minimum.default, b.call(aten.maximum.default, own, low), high)
    return b.cat([b.slice(gone, 1, 0, half), own, b.slice(gone, 1, half)], 1)
