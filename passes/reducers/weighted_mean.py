"""Merge matched tokens by their size-weighted mean."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch

from tokcc.analysis.context import Context
from tokcc.ir.builder import Builder
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.cut import Cut, Matched
from tokcc.passes.piece import Reducer

__all__ = ["WeightedMean", "assignment"]


class WeightedMean(Reducer):
    """Average sources into their destinations (ToMe, arXiv:2210.09461, section 3).

    Attributes:
        size_in_attention: Proportional attention: add ``log(size)`` to the logits of merged keys.
        track_size: Weigh by how many tokens each one already stands for; otherwise every mean is plain.
    """

    kind: ClassVar[str] = "weighted_mean"
    takes: ClassVar[tuple[type, ...]] = (Matched,)

    size_in_attention: bool = True
    track_size: bool = True

    def reduce(self, cut: Cut, chosen: Matched, child: TokenSpace) -> Any:
        """See :class:`WeightedMean`."""
        b = cut.b
        weight = chosen.weight if chosen.weight is not None else cut.space.weight
        padded = chosen.weight is not None
        dtype = b.dtype(cut.x)
        if not self.track_size:
            weight = cut.present() if padded else None  # only padding counts differently
        if weight is not None:
            weight = b.cast(weight, dtype)
        both = _merge(b, cut.x, weight, chosen, padded=padded)
        merged, total = b.call(operator.getitem, both, 0), b.call(operator.getitem, both, 1)
        child.size, child.index, child.valid = chosen.size, chosen.keep, chosen.valid
        child.ascending = chosen.ascending
        if self.track_size:
            # An empty slot may point at a token that was merged away, which counts elsewhere.
            child.weight = b.mul(total, b.cast(chosen.valid, b.dtype(total))) if chosen.partial else total
            child.bias = self.size_in_attention
        child.assign = assignment(cut, chosen)
        child.merge = _stream_merge(weight, chosen, child, padded=padded)
        return merged


def _merge(b: Builder, x: Any, weight: Any, chosen: Matched, *, padded: bool) -> Any:
    op = torch.ops.tokcc.merge_tokens.default
    return b.call(op, x, weight, chosen.keep, chosen.source, chosen.slot, chosen.first, padded)


def assignment(cut: Cut, chosen: Matched) -> Any:
    """Return a function that makes the parent -> child map ``[B, N]`` when something is restored."""
    made: list[Any] = []
    tokens, batch, x, per_sample = cut.tokens, cut.batch, cut.x, cut.per_sample

    def assign(ctx: Context) -> Any:
        if not made:
            b = ctx.builder
            empty = b.full([batch.size, tokens], 0, torch.int64, x)
            kept = b.scatter(empty, 1, chosen.keep, per_sample(b.arange(chosen.size, x)))
            target = b.add(chosen.slot, chosen.first)
            if chosen.partial:
                joins = b.call(torch.ops.aten.lt.Scalar, target, chosen.size)
                target = b.where(joins, target, b.gather(kept, 1, chosen.source))
            made.append(b.scatter(kept, 1, chosen.source, target))
        return made[0]

    return assign


def _stream_merge(weight: Any, chosen: Matched, child: TokenSpace, *, padded: bool) -> Any:
    """Return a function that merges another stream value of the parent space in the same way."""

    def merge(ctx: Context, value: Value, axis: int) -> Value:
        b = ctx.builder

        def change(x: Any) -> Any:
            own = None if weight is None else b.cast(weight, b.dtype(x))
            return b.call(operator.getitem, _merge(b, x, own, chosen, padded=padded), 0)

        axes = list(value.axes)
        axes[axis] = (Factor(child, child.root.old),)
        return value.having(handle=ctx.as_rows(value, axis, change), axes=tuple(axes))

    return merge
