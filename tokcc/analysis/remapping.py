"""Moving a value from one token space down to another: gather, merge, or take fixed rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from tokcc.ir.space import Axis, Factor, TokenSpace, is_ancestor
from tokcc.ir.value import Value

if TYPE_CHECKING:
    from tokcc.analysis.context import Context

__all__ = ["move", "product"]

aten = torch.ops.aten


def move(
    ctx: Context,
    value: Value,
    axis: int,
    position: int,
    source: TokenSpace,
    target: TokenSpace,
    batch: tuple[int, Axis] | None,
) -> Value:
    """Bring one factor of one axis from a space to one below it.

    Args:
        ctx: The walk's context.
        value: The value.
        axis: Which axis.
        position: Which factor of it.
        source: The space of that factor.
        target: The space to go to.
        batch: Where the batch stands in a value that has no batch axis.
    """
    if any(len(a) > 1 for a in value.axes):
        return _remap_fused(ctx, value, axis, position, target, batch)
    path = [space for space in target.chain if is_ancestor(source, space) and space is not source]
    if not value.side and ctx.builder.dtype(value.handle).is_floating_point and any(s.merge for s in path):
        for space in path:
            value = space.merge(ctx, value, axis) if space.merge else _gather(ctx, value, axis, space, batch)
        return value
    if len(path) == 1 and target.rows is not None:
        return _take_rows(ctx, value, axis, target)
    return _gather(ctx, value, axis, target, batch)


def _gather(ctx: Context, value: Value, axis: int, target: TokenSpace, batch: tuple[int, Axis] | None) -> Value:
    b = ctx.builder
    source = (value.axes[axis][0].space if value.axes[axis] else None) or target.root
    index = ctx.index_between(source, target)
    axes = list(value.axes)
    axes[axis] = (Factor(target, target.root.old),)
    if len(b.shape(index)) == 1:
        handle = b.call(aten.index_select.default, value.handle, axis, index)
        return value.having(handle=handle, axes=tuple(axes))
    where = value.batch_axis()
    if where is None:
        if batch is None:
            ctx.fail("a table shared by all samples meets tokens chosen per sample, and the batch axis is not known")
        where, factors = batch
        axes[where] = tuple(f for f in factors if f.space is not None and f.space.is_batch)
    handle = b.call(torch.ops.tokcc.gather_tokens.default, value.handle, index, axis, where)
    gathered = value.having(handle=handle, axes=tuple(axes))
    if batch is not None and len(batch[1]) > 1 and value.batch_axis() is None:
        gathered = _fuse_batch(ctx, gathered, where, batch[1])
    return gathered


def _fuse_batch(ctx: Context, value: Value, axis: int, factors: Axis) -> Value:
    """Repeat a per-sample value over the other factors of a fused batch axis such as ``B*H``."""
    b = ctx.builder
    shape: list[Any] = [b.size(value.handle, i) for i in range(value.rank)]
    place = next(i for i, f in enumerate(factors) if f.space is not None and f.space.is_batch)
    handle = value.handle
    for i in range(len(factors)):
        if i != place:
            handle = b.unsqueeze(handle, axis + i)
    wide = [*shape[:axis], *(ctx.factor_size(f) for f in factors), *shape[axis + 1 :]]
    handle = b.expand(handle, wide)
    handle = b.reshape(handle, [*shape[:axis], ctx.axis_size(factors), *shape[axis + 1 :]])
    axes = list(value.axes)
    axes[axis] = factors
    return value.having(handle=handle, axes=tuple(axes))


def _take_rows(ctx: Context, value: Value, axis: int, target: TokenSpace) -> Value:
    b = ctx.builder
    rows = target.rows or ()
    first, last = rows[0], rows[-1]
    if rows == tuple(range(first, last + 1)):
        handle = b.slice(value.handle, axis, first, None if last == -1 else last + 1)
    else:
        handle = b.call(aten.index_select.default, value.handle, axis, ctx.own_index(target))
    axes = list(value.axes)
    axes[axis] = (Factor(target, target.root.old),)
    return value.having(handle=handle, axes=tuple(axes))


def _remap_fused(
    ctx: Context, value: Value, axis: int, position: int, target: TokenSpace, batch: tuple[int, Axis] | None
) -> Value:
    """Split fused axes, remap, and fuse them again."""
    b = ctx.builder
    if (
        batch is not None
        and value.batch_axis() is None
        and any(f.space is not None and f.space.is_batch for a in value.axes for f in a)
    ):
        batch = None
    flat: list[Axis] = []
    place = 0
    starts: list[int] = []
    for i, a in enumerate(value.axes):
        starts.append(len(flat))
        if i == axis:
            place = len(flat) + position
        flat.extend([(f,) for f in a] if len(a) > 1 else [a])
    shape = [ctx.axis_size(a) for a in flat]
    old = tuple(product(f.old for f in a) for a in flat)
    split = value.having(handle=b.reshape(value.handle, shape), axes=tuple(flat), old=old)
    if batch is not None:
        batch = (starts[batch[0]], batch[1])
    moved = ctx.remap(split, place, 0, target, batch)
    axes: list[Axis] = []
    for i, a in enumerate(value.axes):
        width = max(1, len(a))
        axes.append(tuple(f for part in moved.axes[starts[i] : starts[i] + width] for f in part))
    handle = b.reshape(moved.handle, [ctx.axis_size(a) for a in axes])
    return value.having(handle=handle, axes=tuple(axes))


def product(sizes: Iterable[Any]) -> Any:
    """Return the product of sizes, symbolic ones too."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result
