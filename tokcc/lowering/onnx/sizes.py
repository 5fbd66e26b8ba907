"""Arithmetic on sizes: int64 vectors of one element, or plain ints."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tokcc.lowering.onnx.translate import Translator

__all__ = ["LOWERINGS"]

aten = torch.ops.aten


def _binary(op_type: str, python: Any) -> Any:
    def lower(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
        del node
        a, b = t.size(first), t.size(second)
        if isinstance(a, int) and isinstance(b, int):
            return python(a, b)
        return t.op(op_type, t.size_vector(first), t.size_vector(second))

    return lower


def _floordiv(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
    """Floor division. ONNX's truncates, which is the same unless a size is negative, as in ``-(-n // 2)``."""
    if isinstance(t.size(first), int) or _never_negative(first):
        return _binary("Div", operator.floordiv)(t, node, first, second)
    a, b = t.size(first), t.size_vector(second)
    return t.op("Div", t.op("Sub", a, t.op("Mod", a, b)), b)


def _never_negative(size: fx.Node) -> bool:
    return bool(statically_known_true(size.meta["val"] >= 0))


def _negate(t: Translator, node: fx.Node, first: Any) -> Any:
    del node
    a = t.size(first)
    return -a if isinstance(a, int) else t.op("Neg", a)


def _sym_size(t: Translator, node: fx.Node, x: Any, axis: int) -> Any:
    del node
    rank = x.meta["val"].ndim
    known = x.meta["val"].shape[axis]
    if isinstance(known, int):
        return known
    axis %= rank
    return t.op("Shape", t.value(x), start=axis, end=axis + 1)


def _sym_numel(t: Translator, node: fx.Node, x: Any) -> Any:
    del node
    return t.op("ReduceProd", t.op("Shape", t.value(x)), keepdims=1)


LOWERINGS: dict[Any, Any] = {
    operator.add: _binary("Add", operator.add),
    operator.sub: _binary("Sub", operator.sub),
    operator.mul: _binary("Mul", operator.mul),
    operator.floordiv: _floordiv,
    operator.mod: _binary("Mod", operator.mod),
    operator.neg: _negate,
    torch.sym_min: _binary("Min", min),
    torch.sym_max: _binary("Max", max),
    aten.sym_size.int: _sym_size,
    aten.sym_numel.default: _sym_numel,
}
