"""Sums, means and extrema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.ir.space import Axis, TokenSpace
from tokcc.ir.value import Value

__all__ = ["RULES", "sum_tokens"]

aten = torch.ops.aten


def _dims(x: Value, dim: Any) -> list[int]:
    if dim is None:
        return list(range(x.rank))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return sorted(d % x.rank for d in dims) or list(range(x.rank))


def _result(x: Value, dims: Sequence[int], keepdim: bool, handle: Any, old: tuple[Any, ...]) -> Value:
    axes: list[Axis] = []
    for i, axis in enumerate(x.axes):
        if i not in dims:
            axes.append(axis)
        elif keepdim:
            axes.append(())
    return x.having(handle=handle, axes=tuple(axes), old=old)


def _token_dims(x: Value, dims: Sequence[int]) -> list[tuple[int, TokenSpace]]:
    return [
        (d, f.space)
        for d in dims
        for f in x.axes[d]
        if f.space is not None and not f.space.is_batch and f.space.reduced
    ]


def _weighted(ctx: Context, x: Value, dim: int, space: TokenSpace) -> tuple[Value, Any]:
    """Multiply by the number of tokens each one stands for, and by validity; returns the weights as well."""
    b = ctx.builder
    dtype = b.dtype(x.handle)
    share = None if space.weight is None else b.cast(space.weight, dtype)
    if space.valid is not None:
        mask = b.cast(space.valid, dtype)
        share = mask if share is None else b.mul(share, mask)
    if share is None:
        return x, None
    share = ctx.per_token(share, x.axes, dim)
    return x.having(handle=b.mul(x.handle, share)), share


def mean(ctx: Context, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Mean; over merged tokens each counts as often as it stands for tokens, over pruned ones the kept are averaged."""
    dims = _dims(x, dim)
    old = ctx.old_shape()
    tokens = _token_dims(x, dims)
    if not tokens:
        if dim is None:
            return _result(x, dims, False, ctx.emit(x.handle, **kwargs), old)
        return _result(x, dims, keepdim, ctx.emit(x.handle, dims, keepdim, **kwargs), old)
    if len(tokens) > 1 or len(dims) > 1:
        ctx.fail("a mean over the token axis together with other axes")
    ((axis, space),) = tokens
    if len(x.axes[axis]) > 1:
        ctx.fail("a mean over a token axis that is fused with another axis")
    scaled, share = _weighted(ctx, x, axis, space)
    b = ctx.builder
    if share is None:
        return _result(x, dims, keepdim, b.mean(x.handle, axis, keepdim), old)
    total = b.sum(share, axis, keepdim)
    return _result(x, dims, keepdim, b.div(b.sum(scaled.handle, axis, keepdim), total), old)


def sum_tokens(ctx: Context, x: Value, axis: int, space: TokenSpace, keepdim: bool, old: tuple[Any, ...]) -> Value:
    """Sum over a reduced token axis, marked as a partial total."""
    scaled, _ = _weighted(ctx, x, axis, space)
    handle = ctx.builder.sum(scaled.handle, axis, keepdim)
    result = _result(x, [axis], keepdim, handle, old)
    return result.having(totals=result.totals | {space})


def sum_(ctx: Context, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Sum; over reduced tokens it is a partial total that must be divided by a count of the same tokens."""
    dims = _dims(x, dim)
    old = ctx.old_shape()
    tokens = _token_dims(x, dims)
    if not tokens:
        if dim is None:
            return _result(x, dims, False, ctx.emit(x.handle, **kwargs), old)
        return _result(x, dims, keepdim, ctx.emit(x.handle, dims, keepdim, **kwargs), old)
    if len(dims) > 1:
        ctx.fail("a sum over the token axis together with other axes")
    ((axis, space),) = tokens
    if len(x.axes[axis]) > 1:
        ctx.fail("a sum over a token axis that is fused with another axis")
    return sum_tokens(ctx, x, axis, space, keepdim, old)


def extremum(ctx: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Maximum or minimum over axes without tokens."""
    dims = _dims(x, dim)
    if _token_dims(x, dims):
        ctx.fail("a maximum over the token axis would miss the dropped tokens")
    handle = ctx.emit(x.handle) if dim is None else ctx.emit(x.handle, dim, keepdim)
    return _result(x, dims, keepdim, handle, ctx.old_shape())


def norm(ctx: Context, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Vector norms over axes without tokens."""
    dims = _dims(x, dim)
    if _token_dims(x, dims):
        ctx.fail("a norm over the token axis would miss the dropped tokens")
    return _result(x, dims, keepdim, ctx.emit(x.handle, p, dim, keepdim, **kwargs), ctx.old_shape())


RULES: dict[Any, Any] = {
    aten.mean.dim: mean,
    aten.mean.default: mean,
    aten.sum.dim_IntList: sum_,
    aten.sum.default: sum_,
    aten.amax.default: extremum,
    aten.amin.default: extremum,
    aten.argmax.default: extremum,
    aten.argmin.default: extremum,
    aten.any.dim: extremum,
    aten.all.dim: extremum,
    aten.any.default: extremum,
    aten.linalg_vector_norm.default: norm,
    aten.norm.ScalarOpt_dim: norm,
}
