"""Add to each destination the mean of what joins it."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Matched
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.weighted_mean import assignment
from tokcc.passes.taking import take

__all__ = ["AddMean"]


class AddMean(Reducer):
    """``y_c = x_c + mean of the tokens that join c`` (VisionZip, arXiv:2412.04467); the others stay as they are.

    Not the mean of a destination and its sources: the published form gives the destination as much weight as all of
    them. Sizes of tokens do not count.
    """

    kind: ClassVar[str] = "add_mean"
    takes: ClassVar[tuple[type, ...]] = (Matched,)

    def reduce(self, cut: Cut, chosen: Matched, child: TokenSpace) -> Any:
        """See :class:`AddMean`."""
        b = cut.b
        if chosen.valid is not None:
            cut.ctx.fail("means of padded batches are not weighted here", help="use `reduce: {kind: weighted_mean}`")
        child.size, child.index, child.ascending = chosen.size, chosen.keep, chosen.ascending
        child.assign = assignment(cut, chosen)
        target = b.slice(chosen.keep, 1, chosen.first)  # [B, T]
        ones = b.full([cut.batch.size, cut.tokens], 1.0, b.dtype(cut.x), cut.x)
        count = b.sub_sizes(chosen.size, chosen.first)
        nothing = b.full([cut.batch.size, count], 0.0, b.dtype(cut.x), cut.x)
        # Destinations that weigh nothing themselves become the plain mean of their sources, or zeros without any.
        weight = b.scatter(ones, 1, target, nothing)
        op = torch.ops.tokcc.merge_tokens.default
        both = b.call(op, cut.x, weight, chosen.keep, chosen.source, chosen.slot, chosen.first, True)
        mean = b.call(operator.getitem, both, 0)
        own = b.add(b.slice(mean, 1, chosen.first), take(cut, cut.x, target))
        return b.cat([b.slice(mean, 1, 0, chosen.first), own], 1)
