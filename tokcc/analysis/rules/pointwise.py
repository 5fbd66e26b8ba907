"""Elementwise operations: operands broadcast, axes unify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.analysis.rules.attention import key_bias
from tokcc.analysis.rules.totals import with_totals
from tokcc.ir.space import Axis, Factor
from tokcc.ir.value import Value

__all__ = ["RULES", "pointwise"]

aten = torch.ops.aten


_SCALING = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten._to_copy.default, aten.to.dtype}
"""What attention probabilities survive: they stay proportional to a distribution over the tokens."""


def pointwise(ctx: Context, *args: Any, **kwargs: Any) -> Value:
    """Align all tensor operands by broadcasting and emit the operation."""
    operands = [a for a in args if isinstance(a, Value)]
    if any(v.totals for v in operands):
        return with_totals(ctx, operands, args, kwargs)
    if len(operands) == 1:
        (value,) = operands
        handle = ctx.emit(*_handles(args), **_handles_kw(kwargs))
        return value.having(handle=handle, axes=_weights(ctx, operands, value.axes))
    aligned, axes, old = ctx.broadcast(operands)
    substituted = iter(aligned)
    new_args = [next(substituted) if isinstance(a, Value) else a for a in args]
    handle = ctx.emit(*_handles(new_args), **_handles_kw(kwargs))
    return Value(handle, _weights(ctx, aligned, axes), old, side=all(v.side for v in operands))


def _weights(ctx: Context, operands: Sequence[Value], axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Keep the mark of attention probabilities only where an operation scales whole rows of them."""
    assert ctx.node is not None
    result: list[Axis] = []
    for place, axis in enumerate(axes, start=-len(axes)):
        own = [v.axes[place] for v in operands if v.rank + place >= 0 and v.axes[place]]
        kept = ctx.node.target in _SCALING and len(own) == 1 and any(f.normalised for f in own[0])
        result.append(tuple(Factor(f.space, f.old, kept and f.space is not None) for f in axis))
    return tuple(result)


def like_first(ctx: Context, *args: Any, **kwargs: Any) -> Value:
    """Operations that take only shape, dtype or device of their other operands."""
    value = args[0]
    handle = ctx.emit(*_handles(args), **_handles_kw(kwargs))
    return Value(handle, value.axes, value.old, totals=value.totals, side=value.side)


def constant_like(ctx: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """A tensor of the same shape that does not depend on the values."""
    handle = ctx.emit(x.handle, *args, **kwargs)
    axes = tuple(tuple(Factor(f.space, f.old) for f in axis) for axis in x.axes)
    return Value(handle, axes, x.old, side=x.side)


def type_as(ctx: Context, x: Value, other: Value) -> Value:
    """``x.type_as(y)``: only the dtype of ``y`` matters."""
    if ctx.clean:
        return x.having(handle=ctx.emit())
    return x.having(handle=ctx.builder.cast(x.handle, ctx.builder.dtype(other.handle)))


def softmax(ctx: Context, x: Value, dim: int, *rest: Any, **kwargs: Any) -> Value:
    """Softmax over one axis; over tokens it becomes size-aware, masks empty slots, and its result sums to one."""
    dim %= x.rank
    axis = x.axes[dim]
    handle = x.handle
    reduced = [f.space for f in axis if f.space is not None and not f.space.is_batch and f.space.reduced]
    if reduced:
        if len(axis) > 1:
            ctx.fail("softmax over a token axis that is fused with another axis")
        bias = key_bias(ctx, reduced[0], ctx.builder.dtype(handle))
        if bias is not None:
            handle = ctx.builder.add(handle, ctx.per_token(bias, x.axes, dim))
    out = ctx.emit(handle, dim, *_handles(rest), **_handles_kw(kwargs))
    assert ctx.node is not None
    sums_to_one = ctx.node.target in (aten.softmax.int, aten._softmax.default)
    marked: Axis = tuple(Factor(f.space, f.old, sums_to_one and f.space is not None) for f in axis)
    return x.having(handle=out, axes=(*x.axes[:dim], marked, *x.axes[dim + 1 :]))


def _handles(args: Any) -> list[Any]:
    return [_handle(a) for a in args]


def _handles_kw(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _handle(value) for name, value in kwargs.items()}


def _handle(value: Any) -> Any:
    if isinstance(value, Value):
        return value.handle
    if isinstance(value, list | tuple):
        return type(value)(_handle(v) for v in value)
    return value


RULES: dict[Any, Any] = {
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.log_softmax.int: softmax,
    aten._log_softmax.default: softmax,
    aten.type_as.default: type_as,
    **dict.fromkeys(
        (
            aten._to_copy.default,
            aten.to.dtype,
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.dropout.default,
            aten.lift_fresh_copy.default,
        ),
        like_first,
    ),
    **dict.fromkeys(
        (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
        constant_like,
    ),
    **dict.fromkeys(
        (
            aten.__and__.Tensor,
            aten.__or__.Tensor,
            aten.__xor__.Tensor,
            aten.masked_fill.Scalar,
            aten.masked_fill.Tensor,
            aten.where.ScalarOther,
            aten.where.ScalarSelf,
            aten.where.self,
            aten.gelu.default,
            aten.silu.default,
            aten.mish.default,
            aten.softplus.default,
            aten.relu.default,
            aten.leaky_relu.default,
            aten.hardtanh.default,
            aten.hardswish.default,
            aten.elu.default,
            aten.clamp.default,
            aten.pow.Tensor_Scalar,
        ),
        pointwise,
    ),
}
