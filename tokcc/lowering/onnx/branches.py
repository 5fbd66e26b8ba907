"""Two ways to one result, of which a runtime goes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.recorder import SubgraphRecorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)
_UNBOUNDED = 2**31


def choose_by_size(
    t: Translator,
    node: fx.Node,
    otherwise: Any,
    inside: Any,
    sizes: Sequence[Any],
    low: Sequence[int],
    high: Sequence[int],
) -> Any:
    """An If, into whose branches the translator moves what only they read."""
    conditions = []
    for size, least, most in zip(sizes, low, high, strict=True):
        known = t.size_vector(size)
        if least > 0:
            conditions.append(t.op("GreaterOrEqual", known, t.op.ints([least])))
        if most < _UNBOUNDED:
            conditions.append(t.op("LessOrEqual", known, t.op.ints([most])))
    first, *rest = conditions or [t.op.constant([True], ir.DataType.BOOL)]
    for condition in rest:
        first = t.op("And", first, condition)
    kind = ir_dtype(node.meta["val"].dtype)
    one, other = (SubgraphRecorder(t.op, f"{t.op.scope}/{name}") for name in ("inside", "otherwise"))
    result = t.op(
        "If",
        t.op("Squeeze", first, t.op.ints([0])),
        then_branch=one.graph([], [t.value(inside)], [kind]),
        else_branch=other.graph([], [t.value(otherwise)], [kind]),
    )
    result.type = ir.TensorType(kind)
    t.passages.choices.append(result.producer())
    return result


LOWERINGS: dict[Any, Any] = {torch.ops.tokcc.choose_by_size.default: choose_by_size}
