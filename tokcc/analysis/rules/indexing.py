"""Selecting, slicing and splitting, and look-ups in tables."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.analysis.rules import sequence
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


def _position(ctx: Context, space: TokenSpace, index: Any) -> Any:
    """Translate a fixed position in the root space to the position of the same token in a reduced space."""
    if not isinstance(index, int):
        ctx.fail("a token is selected at a position that is computed")
    if index < 0 and isinstance(space.root.old, int):
        index += space.root.old
    for step in space.chain[1:]:
        assert step.parent is not None
        before = step.parent.size
        if index >= 0 and isinstance(before, int) and index >= before - step.suffix:
            index -= before  # protected at the end: counted from there
        place = index + before if index < 0 and isinstance(before, int) else index
        if place in step.fixed:
            index = step.fixed[place]
        elif step.rows is not None:
            index = _row(ctx, step.rows, index + before if index < 0 and isinstance(before, int) else index)
        elif not (0 <= index < step.prefix or 0 < -index <= step.suffix):
            ctx.fail(
                f"token {index} is selected, but it may have been dropped",
                needed="a protected token",
                help=f"protect it: `protect: {{first: {index + 1}}}`"
                if index >= 0
                else f"protect it: `protect: {{last: {-index}}}`",
            )
    return index


def _row(ctx: Context, rows: Sequence[int], index: int) -> int:
    """Translate a position to its place in a fixed row list."""
    if index not in rows:
        ctx.fail(f"token {index} is selected, but only the rows {list(rows)} were computed")
    return rows.index(index)


def slice_(ctx: Context, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """Slice; of a token axis only protected tokens, or all tokens behind protected ones."""
    dim %= x.rank
    old = ctx.old_shape()
    space = _token_space(ctx, x.axes[dim])
    start = 0 if start is None else start
    if space is not None and space.around is not None and step == 1:
        return sequence.cut_out(ctx, x, dim, space, start, old)
    if same_size(old[dim], x.old[dim]):
        if ctx.clean:
            return x.having(handle=ctx.emit(), old=old)
        if any(f.space is not None for f in x.axes[dim]):
            return x.having(old=old)
    if space is None:
        if _batch(x.axes[dim]) and not ctx.clean:
            ctx.fail("the batch axis is sliced")
        args = [a.handle if isinstance(a, Value) else a for a in (x.handle, dim, start, end, step)]
        return _along(x, dim, ctx.emit(*args), _fresh(old[dim]), old)
    if step != 1 or not isinstance(start, int):
        return _unsupported(ctx, x, dim, old, "a token axis is sliced with a step or a computed start")
    if start < 0 and isinstance(space.root.old, int):
        start += space.root.old
    part = _part(ctx, x, dim, space, start, old)
    if part is not None:
        return part
    what = f"the tokens from {start} on are taken" if start > 0 else "a part of the token axis is taken"
    return _unsupported(ctx, x, dim, old, f"{what}, but they may have been dropped or moved")


def _part(
    ctx: Context, x: Value, dim: int, space: TokenSpace, start: Any, old: tuple[Any, ...], made: Any = None
) -> Value | None:
    """Take a part that every reduction has left in its place: protected tokens, or all tokens behind protected ones.

    Args:
        ctx: The context.
        x: What is sliced.
        dim: Its token axis.
        space: The space of that axis.
        start: First position in the unreduced graph; negative only where its length is symbolic.
        old: Shape of the part in the unreduced graph.
        made: The part, when a copied node makes it already.

    Returns:
        The part, or None when its tokens are not known to be there.
    """
    b = ctx.builder
    count, reductions = old[dim], space.chain[1:]
    if not isinstance(start, int):
        return None
    length = space.root.old
    at_end = same_size(count, -start if start < 0 else length - start)
    if start > 0 and at_end and all(s.prefix >= start for s in reductions):
        handle = made or (ctx.emit() if ctx.clean else b.slice(x.handle, dim, start))
        tail = ctx.tail(space, start)
        return _along(x, dim, handle, (Factor(tail, tail.root.old),), old)
    if not isinstance(count, int):
        return None
    place = _place(reductions, start, count)
    if place is not None:
        handle = made or (ctx.emit() if ctx.clean else b.slice(x.handle, dim, place, place + count))
        return _along(x, dim, handle, _fresh(count), old)
    if at_end and all(s.suffix >= count for s in reductions):
        handle = made or (ctx.emit() if ctx.clean else b.slice(x.handle, dim, b.sub_sizes(space.size, count)))
        return _along(x, dim, handle, _fresh(count), old)
    return None


def _place(reductions: Sequence[TokenSpace], start: int, count: int) -> int | None:
    """Return where ``count`` tokens from ``start`` on stand after reductions that protected them, or None."""
    for step in reductions:
        if step.rows is not None:
            if start not in step.rows:
                return None
            place = step.rows.index(start)
            if step.rows[place : place + count] != tuple(range(start, start + count)):
                return None
            start = place
        elif count == 1 and start in step.fixed:
            start = step.fixed[start]
        elif not 0 <= start <= step.prefix - count:
            return None
    return start if start >= 0 else None


def _along(x: Value, dim: int, handle: Any, axis: Axis, old: tuple[Any, ...]) -> Value:
    """Return a value that differs from ``x`` along one axis."""
    return x.having(handle=handle, axes=(*x.axes[:dim], axis, *x.axes[dim + 1 :]), old=old)


def _unsupported(ctx: Context, x: Value, dim: int, old: tuple[Any, ...], why: str) -> Value:
    if not ctx.clean:
        ctx.fail(why, help="protect these tokens (`protect: {first: P}`), or choose later layers")
    return _along(x, dim, ctx.emit(), _fresh(old[dim]), old)


def _fresh(size: Any) -> Axis:
    return () if isinstance(size, int) and size == 1 else (Factor(None, size),)


def _old_outputs(ctx: Context) -> list[tuple[Any, ...]]:
    """Return the shapes of all outputs in the unreduced graph."""
    assert ctx.node is not None
    return [ctx.old_sizes(value) for value in ctx.node.meta["val"]]


def split_with_sizes(ctx: Context, x: Value, sizes: Sequence[Any], dim: int = 0) -> tuple[Value, ...]:
    """Split into parts of given sizes: along tokens, protected ones and the rest."""
    given = [size.handle if isinstance(size, Value) else size for size in sizes]
    return _split(ctx, x, given, dim % x.rank)


def split(ctx: Context, x: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
    """Split into equal parts."""
    return _split(ctx, x, size.handle if isinstance(size, Value) else size, dim % x.rank)


def _split(ctx: Context, x: Value, given: Any, dim: int) -> tuple[Value, ...]:
    space = _token_space(ctx, x.axes[dim])
    b = ctx.builder
    if _batch(x.axes[dim]) and not ctx.clean:
        ctx.fail("the batch axis is split")
    made = ctx.emit(x.handle, given, dim) if space is None or ctx.clean else None
    parts: list[Value] = []
    start: Any = 0
    for i, old in enumerate(_old_outputs(ctx)):
        handle = None if made is None else b.call(operator.getitem, made, i)
        part = None if space is None else _part(ctx, x, dim, space, start, old, handle)
        if part is None:
            if handle is None:
                ctx.fail(
                    "the token axis is split, and the tokens of a part may have been dropped or moved",
                    help="protect the first tokens (`protect: {first: P}`), or choose later layers",
                )
            part = _along(x, dim, handle, _fresh(old[dim]), old)
        parts.append(part)
        start = start + old[dim]
    return tuple(parts)


def unbind(ctx: Context, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Take every position of an axis without tokens."""
    dim %= x.rank
    if any(f.space is not None for f in x.axes[dim]) and not ctx.clean:
        ctx.fail("the token axis is taken apart")
    made = ctx.emit(x.handle, dim)
    axes = (*x.axes[:dim], *x.axes[dim + 1 :])
    old = (*x.old[:dim], *x.old[dim + 1 :])
    count = len(_old_outputs(ctx))
    return tuple(x.having(handle=ctx.builder.call(operator.getitem, made, i), axes=axes, old=old) for i in range(count))


def index_select(ctx: Context, x: Value, dim: int, index: Value) -> Value:
    """Take positions of an axis without tokens."""
    dim %= x.rank
    if any(f.space is not None for f in x.axes[dim]) and not ctx.clean:
        ctx.fail("tokens are selected at positions that are computed")
    axes = (*x.axes[:dim], *(index.axes or ((),)), *x.axes[dim + 1 :])
    return x.having(handle=ctx.emit(x.handle, dim, index.handle), axes=axes, old=ctx.old_shape())


def index(ctx: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """Take positions of one axis without tokens, written as an index with gaps."""
    given = [(dim, picks) for dim, picks in enumerate(indices) if picks is not None]
    if len(given) != 1 or any(f.space is not None for f in x.axes[given[0][0]]):
        ctx.fail("no axis rule for an index along tokens, or along several axes")
    ((dim, picks),) = given
    handles = [None if item is None else item.handle for item in indices]
    axes = (*x.axes[:dim], *(picks.axes or ((),)), *x.axes[dim + 1 :])
    return x.having(handle=ctx.emit(x.handle, handles), axes=axes, old=ctx.old_shape())


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
    aten.index.Tensor: index,
    aten.embedding.default: embedding,
    aten.gather.default: gather,
}
