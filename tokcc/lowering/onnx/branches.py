"""Two ways to one result, of which a runtime goes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.analysis.sizes import number
from tokcc.errors import LoweringError
from tokcc.ir.size_names import dimension_name
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
    if not t.target.branches:
        return t.value(inside if _decided(t, node, sizes, low, high) else otherwise)
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


def _decided(t: Translator, node: fx.Node, sizes: Sequence[Any], low: Sequence[int], high: Sequence[int]) -> bool:
    """Return which way all shapes of the engine go.

    Raises:
        LoweringError: Some go one way, and some the other.
    """
    bounds = []
    for size in sizes:
        known = size.meta["val"] if isinstance(size, fx.Node) else size
        numbers = [number(known, values) for values in t.target.sizes]
        bounds.append((min(numbers), max(numbers)))
    wanted = list(zip(bounds, low, high, strict=True))
    if all(least <= smallest and largest <= most for (smallest, largest), least, most in wanted):
        return True
    if any(largest < least or smallest > most for (smallest, largest), least, most in wanted):
        return False
    shown = " and ".join(
        f"{_name(t, size)} {f'from {least}' if most >= _UNBOUNDED else f'{least} to {most}'}"
        for size, least, most in zip(sizes, low, high, strict=True)
        if least > 1 or most < _UNBOUNDED
    )
    found = " and ".join(
        f"{_name(t, size)} {smallest} to {largest}" for size, (smallest, largest) in zip(sizes, bounds, strict=True)
    )
    raise LoweringError(
        f"the policy goes two ways by the shapes of a call, and {t.target.name} has one graph for all of them",
        node=f"{node.name} ({node.meta.get('tokcc') or 'the model'})",
        needed=f"shapes that all are within {shown}, or all beyond",
        found=found,
        help="make one engine for prompts and one for single tokens, or for long and for short texts: choose "
        "`--min-shapes` and `--max-shapes` on one side",
    )


def _name(t: Translator, size: Any) -> str:
    known = size.meta["val"] if isinstance(size, fx.Node) else size
    if isinstance(known, int):
        return str(known)
    expression = known.node.expr
    while expression in t.program.symbols:  # what the inputs' sizes make of it says more than a number's name
        expression = t.program.symbols[expression]
    return f"`{dimension_name(expression, t.program.size_names, t.program.symbols)}`"


LOWERINGS: dict[Any, Any] = {torch.ops.tokcc.choose_by_size.default: choose_by_size}
