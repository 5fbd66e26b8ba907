"""Sums, means, extrema and sorting. Axes are operands from opset 18 on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.errors import LoweringError
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

aten = torch.ops.aten


def _axes(x: Any, dim: Any) -> list[int] | None:
    if dim is None:
        return None
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % x.meta["val"].ndim for d in dims] or None


def _reduce(op_type: str) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        del kwargs
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return _bool_reduce(op_type)(t, node, x, dim, keepdim)
        axes = _axes(x, dim)
        value = t.value(x, dtype)
        return t.op(op_type, value, None if axes is None else t.op.ints(axes), keepdims=int(keepdim))

    return lower


def _arg(op_type: str) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        value = t.value(x)
        if dim is None:
            flat = t.op(op_type, t.op("Reshape", value, t.op.ints([-1])), axis=0, keepdims=0)
            return t.op("Reshape", flat, t.op.ints([1] * node.meta["val"].ndim)) if keepdim else flat
        return t.op(op_type, value, axis=dim % x.meta["val"].ndim, keepdims=int(keepdim))

    return lower


def _bool_reduce(op_type: str) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        del node
        axes = _axes(x, dim)
        # To bool first: what counts is being other than zero, whatever the number.
        number = t.op("Cast", t.value(x, torch.bool), to=int(ir_dtype(torch.int32)))
        made = t.op(op_type, number, None if axes is None else t.op.ints(axes), keepdims=int(keepdim))
        return t.op("Cast", made, to=int(ir_dtype(torch.bool)))

    return lower


def extremum_dim(op_type: str, arg_type: str) -> Any:
    """``max``/``min`` over one axis: values and indices."""

    def lower(t: Translator, node: fx.Node, x: Any, dim: int, keepdim: bool = False) -> Any:
        del node
        axis = dim % x.meta["val"].ndim
        value = t.value(x)
        return (
            t.op(op_type, value, t.op.ints([axis]), keepdims=int(keepdim)),
            t.op(arg_type, value, axis=axis, keepdims=int(keepdim)),
        )

    return lower


def cumsum(t: Translator, node: fx.Node, x: Any, dim: int, **kwargs: Any) -> Any:
    """Running sum."""
    del kwargs
    axis = t.op.constant(dim % x.meta["val"].ndim, ir_dtype(torch.int64))
    return t.op("CumSum", t.value(x, node.meta["val"].dtype), axis)


def sort(t: Translator, node: fx.Node, x: Any, dim: int = -1, descending: bool = False) -> Any:
    """Full sort as TopK."""
    del node
    axis = dim % x.meta["val"].ndim
    return t.op("TopK", t.value(x), t.axis(x, axis), outputs=2, axis=axis, largest=int(descending), sorted=1)


def topk(
    t: Translator, node: fx.Node, x: Any, k: Any, dim: int = -1, largest: bool = True, ordered: bool = True
) -> Any:
    """The k extremes of an axis."""
    del node
    return t.op(
        "TopK",
        t.value(x),
        t.size_vector(k),
        outputs=2,
        axis=dim % x.meta["val"].ndim,
        largest=int(largest),
        sorted=int(ordered),
    )


def vector_norm(
    t: Translator, node: fx.Node, x: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """L2 and L1 norms, written out (runtimes get ReduceL2 wrong)."""
    del kwargs
    axes = _axes(x, dim)
    places = None if axes is None else t.op.ints(axes)
    value = t.value(x, node.meta["val"].dtype)
    if order == 2:
        return t.op("Sqrt", t.op("ReduceSum", t.op("Mul", value, value), places, keepdims=int(keepdim)))
    if order == 1:
        return t.op("ReduceSum", t.op("Abs", value), places, keepdims=int(keepdim))
    raise LoweringError(f"a vector norm of order {order}", node=node.name)


LOWERINGS: dict[Any, Any] = {
    aten.mean.dim: _reduce("ReduceMean"),
    aten.mean.default: _reduce("ReduceMean"),
    aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.sum.default: _reduce("ReduceSum"),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.max.default: _reduce("ReduceMax"),
    aten.min.default: _reduce("ReduceMin"),
    aten.max.dim: extremum_dim("ReduceMax", "ArgMax"),
    aten.min.dim: extremum_dim("ReduceMin", "ArgMin"),
    aten.argmax.default: _arg("ArgMax"),
    aten.argmin.default: _arg("ArgMin"),
    aten.any.dim: _bool_reduce("ReduceMax"),
    aten.any.default: _bool_reduce("ReduceMax"),
    aten.all.dim: _bool_reduce("ReduceMin"),
    aten.all.default: _bool_reduce("ReduceMin"),
    aten.cumsum.default: cumsum,
    aten.sort.default: sort,
    aten.topk.default: topk,
    aten.linalg_vector_norm.default: vector_norm,
}
