"""Operations that run over the tokens in order: reversals, causal convolutions, recurrences.

They are defined for every sequence. A part of the tokens in their order is one, so they run over the tokens that are
left as they ran over all of them; what a removed token would have added is gone, as methods for such models want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import tokcc.kernels  # registers the operations
from tokcc.analysis.context import Context
from tokcc.analysis.rules.matmul import conv
from tokcc.analysis.sequences import check_sequence, flipped, gaps, surrounded
from tokcc.ir.builder import same_size
from tokcc.ir.space import Axis, Factor, TokenSpace
from tokcc.ir.value import Value

__all__ = ["RULES", "cut_out"]

aten = torch.ops.aten
assert tokcc.kernels is not None


def _tokens(axis: Axis) -> TokenSpace | None:
    """Return the space of an axis that is tokens and nothing else."""
    if len(axis) != 1 or axis[0].space is None or axis[0].space.is_batch:
        return None
    return axis[0].space


def _tagged(axis: Axis) -> bool:
    return any(f.space is not None for f in axis)


def _with_axis(x: Value, handle: Any, place: int, space: TokenSpace, old: Sequence[Any]) -> Value:
    axis = (Factor(space, space.root.old),)
    return x.having(handle=handle, axes=(*x.axes[:place], axis, *x.axes[place + 1 :]), old=tuple(old))


def flip(ctx: Context, x: Value, dims: Sequence[int]) -> Value:
    """Reverse axes: tokens are the same tokens from behind."""
    axes = list(x.axes)
    for dim in dims:
        place = dim % x.rank
        space = _tokens(x.axes[place])
        if space is None and _tagged(x.axes[place]):
            ctx.fail("an axis that holds samples, or tokens and something else, is reversed")
        if space is not None:
            check_sequence(ctx, space, "a reversal")
            turned = flipped(ctx, space)
            axes[place] = (Factor(turned, turned.root.old),)
    return x.having(handle=ctx.emit(x.handle, list(dims)), axes=tuple(axes), old=ctx.old_shape())


def _without_empty(ctx: Context, x: Value, place: int, space: TokenSpace, fill: float) -> Any:
    """Return the handle with a number in empty slots, where there are any."""
    if space.valid is None:
        return x.handle
    b = ctx.builder
    return b.where(ctx.per_token(space.valid, x.axes, place), x.handle, fill)


def pad(ctx: Context, x: Value, widths: Sequence[int], *rest: Any, **kwargs: Any) -> Value:
    """Padding of the last axes with a constant: tokens have places around them then."""
    axes, old = list(x.axes), ctx.old_shape()
    handle = x.handle
    mode = next((given for given in (*rest, *kwargs.values()) if isinstance(given, str)), "constant")
    if mode != "constant" and any(_tagged(axis) for axis in x.axes[x.rank - len(widths) // 2 :]):
        ctx.fail(f"tokens are padded by others (`{mode}`)")
    for i in range(len(widths) // 2):
        place, before, behind = x.rank - 1 - i, widths[2 * i], widths[2 * i + 1]
        if not before and not behind:
            continue
        space = _tokens(x.axes[place])
        if space is None and _tagged(x.axes[place]):
            ctx.fail("an axis that holds samples, or tokens and something else, is padded")
        if space is None:
            axes[place] = (Factor(None, old[place]),)
            continue
        own, *known = space.around or (space, 0, 0)
        if known[0] + before < 0 or known[1] + behind < 0:
            ctx.fail("tokens are cut off by a negative padding")
        if own is space:
            handle = _without_empty(ctx, x.having(handle=handle), place, space, 0.0)
        wide = surrounded(ctx, own, known[0] + before, known[1] + behind)
        axes[place] = (Factor(wide, wide.root.old),)
    return x.having(handle=ctx.emit(handle, list(widths), *rest, **kwargs), axes=tuple(axes), old=old)


def conv1d(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """A convolution over tokens: where each output reads its own token and ones before it, it needs only a sequence."""
    space = _tokens(x.axes[2]) if x.rank == 3 else None
    given = [value[0] if isinstance(value, list | tuple) and value else value for value in (stride, padding, dilation)]
    if space is not None and all(isinstance(value, int) for value in given) and given[0] == 1:
        own, *known = space.around or (space, 0, 0)
        reach = (weight.old[2] - 1) * given[2]
        before, behind = known[0] + given[1] - reach, known[1] + given[1]
        if before >= 0 and isinstance(before, int):
            check_sequence(ctx, space, "a convolution")
            handle = _without_empty(ctx, x, 2, space, 0.0) if own is space else x.handle
            operands = (handle, weight.handle, None if bias is None else bias.handle)
            made = ctx.emit(*operands, [1], [given[1]], [given[2]], groups)
            wide = surrounded(ctx, own, before, behind)
            axes = (x.axes[0], (Factor(None, ctx.old_shape()[1]),), (Factor(wide, wide.root.old),))
            return Value(made, axes, ctx.old_shape())
    return conv(ctx, x, weight, bias, stride, padding, dilation, groups)


def cut_out(ctx: Context, x: Value, dim: int, space: TokenSpace, start: Any, old: tuple[Any, ...]) -> Value:
    """A slice of tokens with padding around them: the tokens themselves, or they with less padding."""
    assert space.around is not None
    own, before, behind = space.around
    length = own.root.old
    if not isinstance(start, int) or start < 0 or start > before:
        ctx.fail("a part of tokens with padding around them is taken that does not hold all of them")
    left = before - start
    right = 0 if same_size(old[dim], length + left) else old[dim] - length - left
    if not isinstance(right, int) or not 0 <= right <= behind:
        ctx.fail("a part of tokens with padding around them is taken that does not hold all of them")
    wide = surrounded(ctx, own, left, right)
    stop = ctx.builder.add_sizes(wide.size, start)
    handle = ctx.emit() if ctx.clean else ctx.builder.slice(x.handle, dim, start, stop)
    return _with_axis(x, handle, dim, wide, old)


def recurrence(ctx: Context, decay: Value, update: Value, axis: int, initial: Value | None = None) -> Value:
    """A state that runs over the tokens: empty slots pass it on, and removed tokens may still let it decay."""
    place = axis % update.rank
    operands = [decay, update, *([] if initial is None else [initial])]
    both = [[(0, i), (1, i)] for i in range(update.rank)]
    for i in range(0 if initial is None else initial.rank):
        both[i + (i >= place)].append((2, i))
    (first, second, *given), joints = ctx.align(operands, both)
    before = [value.handle for value in given]
    joint = joints[place]
    space = _tokens(joint)
    if space is None and _tagged(joint):
        ctx.fail("a state runs over an axis that holds samples, or tokens and something else")
    old = ctx.old_shape()
    if space is None or not space.reduced:
        handle = ctx.emit(first.handle, second.handle, axis, *before)
        return Value(handle, tuple(joints), old, side=decay.side and update.side)
    check_sequence(ctx, space, "a state")
    if space.around is not None:
        ctx.fail("a state runs over tokens and padding")
    b = ctx.builder
    passed = gaps(ctx, space)
    if passed is not None:
        steps = b.cast(b.add(passed, 1), b.dtype(first.handle))
        powered = b.call(aten.pow.Tensor_Tensor, first.handle, ctx.per_token(steps, joints, place))
        first = first.having(handle=powered)
    kept = _without_empty(ctx, first, place, space, 1.0)
    added = _without_empty(ctx, second, place, space, 0.0)
    return Value(b.call(torch.ops.tokcc.recurrence.default, kept, added, axis, *before), tuple(joints), old)


RULES: dict[Any, Any] = {
    aten.flip.default: flip,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
    aten.conv1d.default: conv1d,
    torch.ops.tokcc.recurrence.default: recurrence,
}
