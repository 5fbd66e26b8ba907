"""Sums over the tokens that are left: worth something only once they are divided by a count of the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.analysis.context import Context
from tokcc.ir.space import TokenSpace
from tokcc.ir.value import Value

__all__ = ["carries_totals", "with_totals"]

aten = torch.ops.aten

_LINEAR = {
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.neg.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.select.int,
    aten.slice.Tensor,
}
"""Operations that a sum over tokens passes as it is: a division after them is a division before them."""

_OF_A_COUNT = {
    aten.clamp.default,
    aten.clamp_min.default,
    aten.maximum.default,
    aten.add.Tensor,
    aten.add.Scalar,
}
"""What keeps a count from being zero; a numerator must not pass them."""


def carries_totals(target: Any) -> bool:
    """Return True for operations that may read a sum over reduced tokens."""
    return target in _LINEAR or target in _OF_A_COUNT or target is aten.div.Tensor


def _plain_sum(node: Any) -> bool:
    """Return True when nothing but linear operations stand between a sum over tokens and its division."""
    while isinstance(node, fx.Node) and node.target in _LINEAR:
        if node.target is aten.sum.dim_IntList:
            return True
        node = node.args[0] if isinstance(node.args[0], fx.Node) else node.args[1]
    return False


def with_totals(ctx: Context, operands: list[Value], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A sum over kept tokens may be scaled, and must in the end be divided by a count of the same tokens."""
    assert ctx.node is not None
    target = ctx.node.target
    if target is aten.div.Tensor:
        return _mean(ctx, args, kwargs)
    totals = frozenset[TokenSpace]().union(*(v.totals for v in operands))
    if target is aten.mul.Tensor and sum(1 for v in operands if v.totals) == 1:
        aligned, axes, old = ctx.broadcast(operands)
        return Value(ctx.emit(*(v.handle for v in aligned), **kwargs), axes, old, totals=totals)
    if len(operands) == 1 or (target in _OF_A_COUNT and all(v.rank == 0 or v.totals for v in operands)):
        # A scalar bound or epsilon may be a tensor.
        (value,) = [v for v in operands if v.totals]
        handles = [a.handle if isinstance(a, Value) else a for a in args]
        return value.having(handle=ctx.emit(*handles, **kwargs))
    ctx.fail(
        "a sum over the token axis is used as it is, but dropped tokens are missing from it",
        needed="a mean, or a division by a count of the same tokens",
    )


def _mean(ctx: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    assert ctx.node is not None
    first, second = args
    if not isinstance(first, Value) or not first.totals or len(first.totals) != 1 or not _plain_sum(ctx.node.args[0]):
        ctx.fail("a division by a sum over kept tokens, of something that is not such a sum itself")
    if not isinstance(second, Value):
        ctx.fail("a sum over kept tokens is divided by a fixed number", needed="a count of the tokens that are left")
    (space,) = first.totals
    if second.totals:
        if second.totals != first.totals:
            ctx.fail("a sum over one token set is divided by a count of another")
        count = second
    else:
        assert ctx.recompute is not None
        count = ctx.recompute(ctx.node.args[1], space)
    plain = [first.having(totals=frozenset()), count.having(totals=frozenset())]
    aligned, axes, old = ctx.broadcast(plain)
    return Value(ctx.emit(*(v.handle for v in aligned), **kwargs), axes, old)
