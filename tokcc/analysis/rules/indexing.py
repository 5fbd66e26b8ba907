"""Selecting, slicing and splitting, and look-ups in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.ir.builder import same_size
from tokcc.ir.space import Axis, Factor, TokenSpace
from tokcc.ir.value import Value

__all__ = ["RULES"]

aten = torch.ops.aten


def _token_space(ctx: Context, axis: Axis) -> TokenSpace | None:
    spaces = [f.space for f in axis if f.space is not None and not f.space.is_batch]
    if not spaces:
        return None
    if len(axis) > 1:
        if not ctx.clean:
            ctx.fail("a token axis that is fused with another axis is sliced")
        return None
    return spaces[0]


def _batch(axis: Axis) -> bool:
    return any(f.space is not None and f.space.is_batch for f in axis)


def select(ctx: Context, x: Value, dim: int, index: Any) -> Value:
    """Take one position; of a token axis only a protected one, or its row of a fixed row list."""
    dim %= x.rank
    space = _token_space(ctx, x.axes[dim])
    axes = (*x.axes[:dim], *x.axes[dim + 1 :])
    old = (*x.old[:dim], *x.old[dim + 1 :])
    if space is not None and space.reduced:
        index = _position(ctx, space, index)
    given = index.handle if isinstance(index, Value) else index
    return x.having(handle=ctx.emit(x.handle, dim, given), axes=axes, old=old)


def _position(ctx: Context, space: TokenSpace, index: Any) -> int:
    """Translate a fixed position in the root space to the position of the same token in a reduced space."""
    if not isinstance(index, int):
        ctx.fail("a token is selected at a position that is computed")
    root = space.root
    if index < 0 and isinstance(root.old, int):
        index += root.old
    for step in space.chain[1:]:
        if step.rows is not None:
            if index < 0:
                ctx.fail("a token is selected from the end of a sequence of symbolic length")
            if index not in step.rows:
                ctx.fail(f"token {index} is selected, but only the rows {list(step.rows)} were computed")
            index = step.rows.index(index)
        elif index >= 0 and index < step.prefix:
            continue
        elif index < 0 and -index <= step.suffix:
            continue
        elif isinstance(step.old, int) and isinstance(step.size, int) and index >= step.old - step.suffix and index >= 0:
            index -= step.old - step.size
        else:
            ctx.fail(
                f"token {index} is selected, but it may have been dropped",
                needed="a protected token",
                help=f"protect it: `protect: {{first: {index + 1}}}`" if index >= 0 else "protect it: `protect: {last: 1}`",
            )
    return index


def slice_(ctx: Context, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """Slice; of a token axis only the protected head of it, or the rest after it."""
    dim %= x.rank
    old = ctx.old_shape()
    space = _token_space(ctx, x.axes[dim])
    start = 0 if start is None else start
    if same_size(old[dim], x.old[dim]):
        whole = x.axes[dim]
        if ctx.clean:
            return x.having(handle=ctx.emit(), axes=x.axes, old=old)
        if any(f.space is not None for f in whole):
            return x.having(old=old)
    if space is None:
        axes = (*x.axes[:dim], _fresh(old[dim]), *x.axes[dim + 1 :])
        if _batch(x.axes[dim]) and not ctx.clean:
            ctx.fail("the batch axis is sliced")
        args = [a.handle if isinstance(a, Value) else a for a in (x.handle, dim, start, end, step)]
        return x.having(handle=ctx.emit(*args), axes=axes, old=old)
    if step != 1 or not isinstance(start, int):
        return _unsupported(ctx, x, dim, old, "a token axis is sliced with a step or a computed start")
    root = space.root
    length = root.old
    if start < 0 and isinstance(length, int):
        start += length
    stops_at_end = same_size(old[dim], length - start)
    if start > 0 and stops_at_end:
        if all(s.prefix >= start for s in space.chain[1:]):
            tail = ctx.tail(space, start)
            handle = ctx.emit() if ctx.clean else ctx.builder.slice(x.handle, dim, start)
            axes = (*x.axes[:dim], (Factor(tail, tail.root.old),), *x.axes[dim + 1 :])
            return x.having(handle=handle, axes=axes, old=old)
        return _unsupported(ctx, x, dim, old, f"the tokens from {start} on are taken, but they are no longer together")
    if start == 0 and isinstance(old[dim], int):
        count = old[dim]
        if all(s.prefix >= count for s in space.chain[1:]):
            handle = ctx.emit() if ctx.clean else ctx.builder.slice(x.handle, dim, 0, count)
            return x.having(handle=handle, axes=(*x.axes[:dim], _fresh(count), *x.axes[dim + 1 :]), old=old)
    return _unsupported(ctx, x, dim, old, "a part of the token axis is taken, but its tokens may have been dropped")


def _unsupported(ctx: Context, x: Value, dim: int, old: tuple[Any, ...], why: str) -> Value:
    if not ctx.clean:
        ctx.fail(why, help="protect these tokens (`protect: {first: P}`), or choose later layers")
    return x.having(handle=ctx.emit(), axes=(*x.axes[:dim], _fresh(old[dim]), *x.axes[dim + 1 :]), old=old)


def _fresh(size: Any) -> Axis:
    return () if isinstance(size, int) and size == 1 else (Factor(None, size),)


def _outputs(ctx: Context) -> list[tuple[Any, ...]]:
    assert ctx.node is not None
    return [tuple(v.shape) for v in ctx.node.meta["val"]]


def split_with_sizes(ctx: Context, x: Value, sizes: Sequence[Any], dim: int = 0) -> tuple[Value, ...]:
    """Split into parts of given sizes: along tokens, the protected head and the rest."""
    dim %= x.rank
    parts: list[Value] = []
    start: Any = 0
    space = _token_space(ctx, x.axes[dim])
    if space is None or ctx.clean:
        made = ctx.emit(x.handle, [s.handle if isinstance(s, Value) else s for s in sizes], dim)
        return _getitems(ctx, x, made, dim, space)
    for size in sizes:
        old = list(x.old)
        old[dim] = size
        parts.append(_part(ctx, x, dim, start, size))
        start = start + size
    return tuple(parts)


def _part(ctx: Context, x: Value, dim: int, start: Any, size: Any) -> Value:
    space = _token_space(ctx, x.axes[dim])
    assert space is not None
    old = (*x.old[:dim], size, *x.old[dim + 1 :])
    protected = all(isinstance(start, int) and s.prefix >= start for s in space.chain[1:])
    b = ctx.builder
    if protected and same_size(start + size, space.root.old):
        tail = ctx.tail(space, start)
        axes = (*x.axes[:dim], (Factor(tail, tail.root.old),), *x.axes[dim + 1 :])
        return x.having(handle=b.slice(x.handle, dim, start), axes=axes, old=old)
    if isinstance(start, int) and isinstance(size, int) and all(s.prefix >= start + size for s in space.chain[1:]):
        axes = (*x.axes[:dim], _fresh(size), *x.axes[dim + 1 :])
        return x.having(handle=b.slice(x.handle, dim, start, start + size), axes=axes, old=old)
    ctx.fail("the token axis is split, and the parts are no longer together")


def _getitems(ctx: Context, x: Value, made: Any, dim: int, space: TokenSpace | None) -> tuple[Value, ...]:
    """Take the outputs of a split along ``dim``; in an unreduced graph a head/rest split keeps its spaces."""
    import operator

    values: list[Value] = []
    start: Any = 0
    for i, old in enumerate(_old_outputs(ctx)):
        axis: Axis = _fresh(old[dim])
        if space is not None and isinstance(start, int) and start > 0 and same_size(start + old[dim], space.root.old):
            tail = ctx.tail(space, start)
            axis = (Factor(tail, tail.root.old),)
        start = start + old[dim]
        handle = ctx.builder.call(operator.getitem, made, i)
        values.append(x.having(handle=handle, axes=(*x.axes[:dim], axis, *x.axes[dim + 1 :]), old=old))
    return tuple(values)


def _old_outputs(ctx: Context) -> list[tuple[Any, ...]]:
    return [tuple(shape) for shape in _outputs(ctx)]


def split(ctx: Context, x: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
    """Split into equal parts."""
    dim %= x.rank
    sizes = [old[dim] for old in _old_outputs(ctx)]
    if _token_space(ctx, x.axes[dim]) is None or ctx.clean:
        made = ctx.emit(x.handle, size.handle if isinstance(size, Value) else size, dim)
        return _getitems(ctx, x, made, dim, _token_space(ctx, x.axes[dim]))
    return split_with_sizes(ctx, x, sizes, dim)


def unbind(ctx: Context, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Take every position of an axis without tokens."""
    import operator

    dim %= x.rank
    if any(f.space is not None for f in x.axes[dim]) and not ctx.clean:
        ctx.fail("the token axis is taken apart")
    made = ctx.emit(x.handle, dim)
    axes = (*x.axes[:dim], *x.axes[dim + 1 :])
    old = (*x.old[:dim], *x.old[dim + 1 :])
    count = len(_outputs(ctx))
    return tuple(x.having(handle=ctx.builder.call(operator.getitem, made, i), axes=axes, old=old) for i in range(count))


def index_select(ctx: Context, x: Value, dim: int, index: Value) -> Value:
    """Take positions of an axis without tokens."""
    dim %= x.rank
    if any(f.space is not None for f in x.axes[dim]) and not ctx.clean:
        ctx.fail("tokens are selected at positions that are computed")
    axes = (*x.axes[:dim], *(index.axes or ((),)), *x.axes[dim + 1 :])
    return x.having(handle=ctx.emit(x.handle, dim, index.handle), axes=axes, old=ctx.old_shape())


def embedding(ctx: Context, table: Value, index: Value, *rest: Any) -> Value:
    """Rows of a table: the axes of the index, then the features."""
    handle = ctx.emit(table.handle, index.handle, *rest)
    return Value(handle, (*index.axes, table.axes[1]), (*index.old, table.old[1]), side=index.side)


def gather(ctx: Context, x: Value, dim: int, index: Value, **kwargs: Any) -> Value:
    """``torch.gather`` along an axis without tokens; the other axes agree."""
    dim %= x.rank
    old = ctx.old_shape()
    if any(f.space is not None for f in x.axes[dim]) and not ctx.clean:
        ctx.fail("tokens are gathered at positions that are computed")
    groups = [[(0, a), (1, a)] for a in range(x.rank) if a != dim]
    (left, right), joints = ctx.align([x, index], groups)
    handle = ctx.emit(left.handle, dim, right.handle, **kwargs)
    axes = [*joints[:dim], right.axes[dim], *joints[dim:]]
    return Value(handle, tuple(axes), old, side=x.side and index.side)


RULES: dict[Any, Any] = {
    aten.select.int: select,
    aten.slice.Tensor: slice_,
    aten.split_with_sizes.default: split_with_sizes,
    aten.split.sizes: split_with_sizes,
    aten.split.Tensor: split,
    aten.chunk.default: split,
    aten.unbind.int: unbind,
    aten.index_select.default: index_select,
    aten.embedding.default: embedding,
    aten.gather.default: gather,
}
