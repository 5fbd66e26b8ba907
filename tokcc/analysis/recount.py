"""Counting tokens again after a reduction: the divisor of a masked mean, over the tokens that are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tokcc.analysis.rules.reduction import sum_tokens
from tokcc.ir.builder import same_size
from tokcc.ir.space import Axis, Factor, TokenSpace
from tokcc.ir.value import Value

if TYPE_CHECKING:
    from tokcc.analysis.walk import Walk

__all__ = ["recount"]

aten = torch.ops.aten

_AFTER_THE_SUM = {
    aten.clamp.default,
    aten.clamp_min.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.maximum.default,
}


def recount(walk: Walk, node: Any, space: TokenSpace) -> Value:
    """Evaluate a count of tokens again over the tokens of ``space``.

    Follows the unreduced graph from the divisor of a mean up to the sum over tokens it comes from, and repeats that
    chain with the reduced operand.

    Raises:
        AxisError: When the divisor is not such a count.
    """
    if not isinstance(node, fx.Node):
        walk.ctx.fail("a sum over kept tokens is divided by something that does not count tokens")
    known = walk.env.get(node)
    if node.target is aten.sum.dim_IntList and isinstance(node.args[0], fx.Node):
        return _sum_again(walk, node, walk.env[node.args[0]], space)
    if node.target in _AFTER_THE_SUM and isinstance(node.args[0], fx.Node) and isinstance(known, Value):
        inner = recount(walk, node.args[0], space)
        given: Any = fx.node.map_arg((node.args[1:], dict(node.kwargs)), lambda n: _handle(walk.env[n]))
        handle = walk.builder.call(node.target, inner.handle, *given[0], **given[1])
        return known.having(handle=handle, totals=inner.totals)
    walk.ctx.fail("a sum over kept tokens is divided by something that does not count the same tokens")


def _handle(value: Any) -> Any:
    return value.handle if isinstance(value, Value) else value


def _sum_again(walk: Walk, node: fx.Node, source: Any, space: TokenSpace) -> Value:
    given: Any = node.args[1]
    dims = [given] if isinstance(given, int) else list(given)
    if len(dims) != 1 or not isinstance(source, Value) or not source.side:
        walk.ctx.fail("a sum over kept tokens is divided by something that does not count the same tokens")
    keepdim = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    axis = dims[0] % source.rank
    if not same_size(source.old[axis], space.root.old):
        walk.ctx.fail("a sum over kept tokens is divided by a sum over something else")
    assert walk.batch is not None
    axes: list[Axis] = list(source.axes)
    axes[axis] = (Factor(space.root, space.root.old),)
    # In front of the tokens where there is a choice: that is where models have their batch.
    others = [*range(axis), *range(axis + 1, source.rank)]
    own = next((i for i in others if same_size(source.old[i], walk.batch.old)), None)
    if own is not None:
        axes[own] = (Factor(walk.batch, source.old[own]),)
    moved = walk.ctx.remap(source.having(axes=tuple(axes)), axis, 0, space, None)
    old = walk.old_shape(node)
    return sum_tokens(walk.ctx, moved, axis, space, keepdim, old)
