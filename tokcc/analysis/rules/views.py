"""Shape operations. Sizes that a trace has baked in are rebuilt from the axes' factors, never searched and replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.ir.builder import same_size
from tokcc.ir.space import Axis, Factor
from tokcc.ir.value import Value

__all__ = ["RULES", "regroup"]

aten = torch.ops.aten


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def regroup(ctx: Context, axes: Sequence[Axis], out_old: Sequence[Any]) -> tuple[Axis, ...]:
    """Distribute the factors of the input axes over the output axes of a reshape.

    Args:
        ctx: For errors.
        axes: Axes of the input.
        out_old: Output shape in the unreduced graph.

    Returns:
        The output axes. Tagged factors are atomic; untagged ones may be split.

    Raises:
        AxisError: When a tagged factor would have to be split: windows over tokens.
    """
    queue = [f for axis in axes for f in axis if not (f.space is None and _one(f.old))]
    queue.reverse()
    result: list[Axis] = []
    for wanted in out_old:
        taken: list[Factor] = []
        size: Any = 1
        if _one(wanted) and queue and queue[-1].space is not None and _one(queue[-1].old):
            # A batch of one keeps its own axis.
            taken.append(queue.pop())
        while not same_size(size, wanted):
            if not queue:
                ctx.fail("a reshape whose axes do not fit together")
            factor = queue.pop()
            grown = size * factor.old
            if same_size(grown, wanted) or _divides(grown, wanted):
                taken.append(factor)
                size = grown
                continue
            if factor.space is not None:
                kind = "batch" if factor.space.is_batch else "token"
                ctx.fail(f"a reshape splits the {kind} axis")
            part = _quotient(wanted, size)
            if part is None or not isinstance(factor.old, int):
                ctx.fail("a reshape splits an axis of symbolic size")
            if part == 0 or factor.old % part:
                ctx.fail("a reshape mixes axes")
            taken.append(Factor(None, part))
            queue.append(Factor(None, factor.old // part))
            size = size * part
        result.append(_joined(taken))
    if queue:
        ctx.fail("a reshape whose axes do not fit together")
    return tuple(result)


def _quotient(wanted: Any, size: Any) -> int | None:
    """Return ``wanted / size`` when it is a number, also where both are symbolic (``4*B`` by ``B``)."""
    quotient = wanted // size
    if isinstance(quotient, int):
        return quotient
    expression = quotient.node.expr
    return int(expression) if expression.is_Integer else None


def _divides(grown: Any, wanted: Any) -> bool:
    if isinstance(grown, int) and isinstance(wanted, int):
        return grown <= wanted and wanted % grown == 0
    # A symbolic product that is still a proper part of the wanted size: B of B*H, or of B*N.
    if isinstance(wanted, int):
        return False
    return bool(same_size(wanted % grown, 0))


def _joined(factors: list[Factor]) -> Axis:
    """Fuse neighbouring untagged factors."""
    joined: list[Factor] = []
    for factor in factors:
        if joined and joined[-1].space is None and factor.space is None:
            joined[-1] = Factor(None, joined[-1].old * factor.old)
        else:
            joined.append(factor)
    return tuple(joined)


def reshape(ctx: Context, x: Value, shape: Sequence[Any]) -> Value:
    """Rebuild the whole target shape from factors."""
    old = ctx.old_shape()
    axes = regroup(ctx, x.axes, old)
    if ctx.clean:
        return x.having(handle=ctx.emit(), axes=axes, old=old)
    target: list[Any] = []
    for axis, given in zip(axes, shape, strict=True):
        tagged = any(f.space is not None for f in axis)
        size = given.handle if isinstance(given, Value) else given
        target.append(ctx.axis_size(axis) if tagged or _minus_one(size) else size)
    return x.having(handle=ctx.builder.reshape(x.handle, target), axes=axes, old=old)


def _minus_one(size: Any) -> bool:
    return isinstance(size, int) and size == -1


def flatten(ctx: Context, x: Value, *rest: Any) -> Value:
    """``flatten`` is a reshape."""
    return reshape(ctx, x, [-1] * len(ctx.old_shape()))


def permute(ctx: Context, x: Value, dims: Sequence[int]) -> Value:
    """Reorder axes."""
    order = [d % x.rank for d in dims]
    return x.having(
        handle=ctx.emit(x.handle, order), axes=tuple(x.axes[d] for d in order), old=tuple(x.old[d] for d in order)
    )


def transpose(ctx: Context, x: Value, first: int, second: int) -> Value:
    """Swap two axes."""
    order = list(range(x.rank))
    order[first % x.rank], order[second % x.rank] = order[second % x.rank], order[first % x.rank]
    return x.having(
        handle=ctx.emit(x.handle, first, second),
        axes=tuple(x.axes[d] for d in order),
        old=tuple(x.old[d] for d in order),
    )


def t(ctx: Context, x: Value) -> Value:
    """Transpose of a matrix."""
    return x.having(handle=ctx.emit(x.handle), axes=x.axes[::-1], old=x.old[::-1])


def movedim(ctx: Context, x: Value, source: Any, destination: Any) -> Value:
    """Move axes."""
    sources = [source] if isinstance(source, int) else list(source)
    destinations = [destination] if isinstance(destination, int) else list(destination)
    places: dict[int, int] = {d % x.rank: s % x.rank for s, d in zip(sources, destinations, strict=True)}
    rest = iter(i for i in range(x.rank) if i not in places.values())
    order = [places[i] if i in places else next(rest) for i in range(x.rank)]
    return x.having(
        handle=ctx.emit(x.handle, source, destination),
        axes=tuple(x.axes[d] for d in order),
        old=tuple(x.old[d] for d in order),
    )


def unsqueeze(ctx: Context, x: Value, dim: int) -> Value:
    """Insert an axis of size one."""
    place = dim % (x.rank + 1)
    return x.having(
        handle=ctx.emit(x.handle, dim),
        axes=(*x.axes[:place], (), *x.axes[place:]),
        old=(*x.old[:place], 1, *x.old[place:]),
    )


def squeeze(ctx: Context, x: Value, dim: Any = None) -> Value:
    """Remove axes of size one."""
    dims = range(x.rank) if dim is None else [dim] if isinstance(dim, int) else dim
    places = {d % x.rank for d in dims}
    gone = [i for i in sorted(places) if _one(x.old[i])]
    if any(x.axes[i] for i in gone):
        ctx.fail("squeeze of a token axis that has a single token in the unreduced model")
    keep = [i for i in range(x.rank) if i not in gone]
    args = (x.handle,) if dim is None else (x.handle, dim)
    return x.having(handle=ctx.emit(*args), axes=tuple(x.axes[i] for i in keep), old=tuple(x.old[i] for i in keep))


def expand(ctx: Context, x: Value, shape: Sequence[Any], *, implicit: bool = False) -> Value:
    """Broadcast; axes that carry tokens keep their current size."""
    del implicit  # part of the operation's schema, without meaning
    old = ctx.old_shape()
    lead = len(old) - x.rank
    axes: list[Axis] = []
    target: list[Any] = []
    for i, size in enumerate(old):
        given = shape[i].handle if isinstance(shape[i], Value) else shape[i]
        own = x.axes[i - lead] if i >= lead else ()
        if own:
            axes.append(own)
            target.append(-1)
        else:
            axes.append(() if _one(size) else (Factor(None, size),))
            target.append(given)
    return x.having(handle=ctx.emit(x.handle, target), axes=tuple(axes), old=old)


def repeat(ctx: Context, x: Value, repeats: Sequence[Any]) -> Value:
    """Tile; a token axis may only be repeated once."""
    old = ctx.old_shape()
    lead = len(old) - x.rank
    axes: list[Axis] = []
    for i, size in enumerate(old):
        own = x.axes[i - lead] if i >= lead else ()
        if own and any(f.space is not None for f in own):
            if not _one(repeats[i]):
                ctx.fail("a token axis is repeated")
            axes.append(own)
        else:
            axes.append(() if _one(size) else (Factor(None, size),))
    sizes = [r.handle if isinstance(r, Value) else r for r in repeats]
    return x.having(handle=ctx.emit(x.handle, sizes), axes=tuple(axes), old=old)


def cat(ctx: Context, xs: Sequence[Value], dim: int = 0) -> Value:
    """Concatenate: along another axis, or the protected leading tokens with the rest of their space."""
    dim %= xs[0].rank
    old = ctx.old_shape()
    along = [x.axes[dim] for x in xs]
    groups = [[(i, axis) for i in range(len(xs))] for axis in range(xs[0].rank) if axis != dim]
    tagged = [i for i, axis in enumerate(along) if any(f.space is not None for f in axis)]
    joint: Axis = (Factor(None, old[dim]),)
    if tagged:
        joint = _joined_tokens(ctx, xs, dim, tagged)
    aligned, joints = ctx.align(list(xs), groups)
    handle = ctx.emit([x.handle for x in aligned], dim)
    axes = [*joints[:dim], joint, *joints[dim:]]
    return Value(handle, tuple(axes), old, side=all(x.side for x in xs))


def stack(ctx: Context, parts: Sequence[Value], dim: int = 0) -> Value:
    """Values of one shape beside each other on a new axis."""
    values, axes, _ = ctx.broadcast(list(parts))
    handle, old = ctx.emit([value.handle for value in values], dim), ctx.old_shape()
    place = dim % len(old)
    new: Axis = () if len(parts) == 1 else (Factor(None, len(parts)),)
    return Value(handle, (*axes[:place], new, *axes[place:]), old, side=all(value.side for value in parts))


def _joined_tokens(ctx: Context, xs: Sequence[Value], dim: int, tagged: list[int]) -> Axis:
    if len(tagged) != 1 or tagged[0] != len(xs) - 1 or len(xs[-1].axes[dim]) != 1:
        if ctx.clean:
            return (Factor(None, ctx.old_shape()[dim]),)
        ctx.fail("tokens are concatenated with other tokens")
    space = xs[-1].axes[dim][0].space
    assert space is not None
    first: Any = 0
    for x in xs[:-1]:
        first = first + x.old[dim]
    if space.tail_of is not None and same_size(space.tail_of[1], first):
        whole = space.tail_of[0]
        return (Factor(whole, whole.root.old),)
    if ctx.clean:
        return (Factor(None, ctx.old_shape()[dim]),)
    ctx.fail("tokens are concatenated with other tokens")


RULES: dict[Any, Any] = {
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.reshape.default: reshape,
    aten.flatten.using_ints: flatten,
    aten.unflatten.int: flatten,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: t,
    aten.movedim.int: movedim,
    aten.movedim.intlist: movedim,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.cat.default: cat,
    aten.stack.default: stack,
}
