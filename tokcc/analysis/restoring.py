"""Giving tokens back: from a reduced space up to the unreduced one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value

if TYPE_CHECKING:
    from tokcc.analysis.context import Context

__all__ = ["own_assign", "restore"]


def restore(ctx: Context, value: Value, axis: int, before: Callable[[TokenSpace], Any] | None = None) -> Value:
    """Bring one token axis back up to the root space.

    A merged token is given to all tokens it stands for; a dropped token gets what ``before`` says, else zeros.

    Args:
        ctx: The walk's context.
        value: The value.
        axis: Its token axis.
        before: Returns, for a space that dropped tokens, what all tokens of its parent had in place of ``value`` just
            before: ``[B, N, ...]``, or None where that is not known.
    """
    b = ctx.builder
    (factor,) = value.axes[axis]
    space = factor.space
    assert space is not None
    pending: Any = None
    while space.parent is not None:
        own = own_assign(ctx, space)
        if _spread(space) is not None:
            value = _spread_up(ctx, _apply_assign(ctx, value, axis, pending, space), axis, space)
            pending = None
        elif own is not None:
            pending = own if pending is None else b.gather(pending, 1, own)
        else:
            value = _apply_assign(ctx, value, axis, pending, space)
            pending = None
            value = _scatter_up(ctx, value, axis, space, None if before is None else before(space))
        space = space.parent
    return _apply_assign(ctx, value, axis, pending, space)


def own_assign(ctx: Context, space: TokenSpace) -> Any:
    """Return the position in ``space`` of each of its parent's tokens, int64 ``[B, N]``; None for a drop."""
    if space.tail_of is not None:
        whole, first = space.tail_of
        inner = own_assign(ctx, whole)
        return None if inner is None else ctx.builder.sub(ctx.builder.slice(inner, 1, first), first)
    return space.assign(ctx) if callable(space.assign) else space.assign


def _spread(space: TokenSpace) -> tuple[Any, int] | None:
    """Return what spreads a space's values over its parent's tokens, and how many leading ones are left out."""
    whole, first = space.tail_of or (space, 0)
    return None if whole.spread is None else (whole.spread, first)


def _spread_up(ctx: Context, value: Value, axis: int, space: TokenSpace) -> Value:
    known = _spread(space)
    assert known is not None
    assert space.parent is not None
    spread, first = known
    handle = ctx.as_rows(value, axis, lambda x: spread(ctx, x, first))
    axes = list(value.axes)
    axes[axis] = (Factor(space.parent, space.root.old),)
    return value.having(handle=handle, axes=tuple(axes))


def _apply_assign(ctx: Context, value: Value, axis: int, assign: Any, space: TokenSpace) -> Value:
    axes = list(value.axes)
    axes[axis] = (Factor(space, space.root.old),)
    if assign is None:
        return value.having(axes=tuple(axes))
    where = value.batch_axis()
    if where is None:
        ctx.fail("a value without a batch axis cannot be given back to its tokens")
    handle = ctx.builder.call(torch.ops.tokcc.gather_tokens.default, value.handle, assign, axis, where)
    return value.having(handle=handle, axes=tuple(axes))


def _scatter_up(ctx: Context, value: Value, axis: int, space: TokenSpace, base: Any) -> Value:
    b = ctx.builder
    parent = space.parent
    assert parent is not None
    where = value.batch_axis()
    if where is None:
        ctx.fail("a value without a batch axis cannot be given back to its tokens")
    front = [where, axis, *(i for i in range(value.rank) if i not in (where, axis))]
    x = b.permute(value.handle, front)
    shape = [b.size(x, i) for i in range(value.rank)]
    index = ctx.own_index(space)
    if len(b.shape(index)) == 1:
        index = b.expand(b.unsqueeze(index, 0), [shape[0], -1])
    if base is None:
        base = b.full([shape[0], parent.size, *shape[2:]], 0, b.dtype(x), x)
    elif space.tail_of is not None:
        base = b.slice(base, 1, space.tail_of[1])
    if space.valid is not None:
        # Slots that hold no real token must not overwrite what they were filled with.
        mask = space.valid
        for _ in range(value.rank - 2):
            mask = b.unsqueeze(mask, -1)
        x = b.where(mask, x, b.call(torch.ops.tokcc.gather_tokens.default, base, index, 1, 0))
    full = b.call(torch.ops.tokcc.scatter_tokens.default, base, index, x)
    back = [front.index(i) for i in range(value.rank)]
    axes = list(value.axes)
    axes[axis] = (Factor(parent, parent.root.old),)
    return value.having(handle=b.permute(full, back), axes=tuple(axes))
