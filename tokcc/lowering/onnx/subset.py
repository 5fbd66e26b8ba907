"""Greedy selections as Loops that carry float states; which tokens are picked is a mark in one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.kernels.dpp_select import SPANNED
from tokcc.lowering.onnx.recorder import SubgraphRecorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

ops = torch.ops.tokcc
assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)
_PICKED = 1e38
"""Marks a picked token: no score can win from there."""


def greedy_select(
    t: Translator, node: fx.Node, similarity: Any, unary: Any, first: Any, k: Any, form: str = "nearest"
) -> Any:
    """The state is how well the picked tokens represent each token; picked ones are marked."""
    del node
    op = t.op
    table, base = t.value(similarity), t.value(unary)
    positions = _positions(op, base)

    def after(op: Any, state: Any, choice: Any) -> Any:
        best = op("Add" if form == "all" else "Max", state, _row(op, table, choice))
        return op("Where", op("Equal", positions, choice), op.constant(_PICKED, np.float32), best)

    def step(op: Any, number: Any, state: Any) -> list[Any]:
        del number
        if form == "product":
            score = op("Mul", base, op("Sub", op.constant(1.0, np.float32), state))
        else:
            score = op("Sub", base, state)
        return [after(op, state, op("ArgMax", score, axis=1, keepdims=1))]

    start = op.constant(0.0 if form == "all" else -1e30, np.float32)
    nothing = op("Expand", start, op("Shape", base))
    state = after(op, nothing, op("ArgMax", t.value(first), axis=1, keepdims=1))
    (state,) = _loop(t, k, [state], step, done=1)
    return _picked(t, op("Greater", state, op.constant(_PICKED / 2, np.float32)), positions, k)


def cover_select(t: Translator, node: fx.Node, table: Any, unary: Any, k: Any) -> Any:
    """The states are the cover of each row, and the scores of last resort, where picked tokens are marked."""
    del node
    op = t.op
    entries = t.value(table)
    last = _last_resort(op, t.value(unary))
    positions = _positions(op, last)

    def step(op: Any, number: Any, covered: Any, left: Any) -> list[Any]:
        del number
        gap = op("Relu", op("Sub", entries, op("Unsqueeze", covered, op.ints([2]))))
        gain = op("ReduceSum", gap, op.ints([1]), keepdims=0)
        choice = op("ArgMax", op("Add", gain, left), axis=1, keepdims=1)
        column = _row(op, op("Transpose", entries, perm=[0, 2, 1]), choice)
        return [op("Max", covered, column), _marked(op, left, positions, choice)]

    none = op("Mul", op("ReduceMax", entries, op.ints([2]), keepdims=0), op.constant(0.0, np.float32))  # [B, R]
    _, left = _loop(t, k, [none, last], step)
    return _picked(t, op("Less", left, op.constant(-_PICKED / 2, np.float32)), positions, k)


def dpp_select(t: Translator, node: fx.Node, kernel: Any, unary: Any, k: Any) -> Any:
    """The states are the gains, the columns of the Cholesky factor so far, and the scores of last resort."""
    del node
    op = t.op
    entries = t.value(kernel)
    last = _last_resort(op, t.value(unary))
    positions = _positions(op, last)
    zero, tiny = op.constant(0.0, np.float32), op.constant(float(torch.finfo(torch.float32).tiny), np.float32)
    rows, columns = op("Unsqueeze", positions, op.ints([1])), op("Unsqueeze", positions, op.ints([0]))
    own = op("Where", op("Equal", rows, columns), entries, zero)
    diagonal = op("ReduceSum", own, op.ints([2]), keepdims=0)  # [B, N]
    floor = op("Mul", diagonal, op.constant(SPANNED, np.float32))
    count = t.size_vector(k)
    shape = op("Concat", op("Shape", last), count, axis=0)
    factor = op("Expand", zero, shape)  # [B, N, k]
    places = op("Range", op.constant(0, _INT), op("Squeeze", count, op.ints([0])), op.constant(1, _INT))

    def step(op: Any, number: Any, gain: Any, factor: Any, left: Any) -> list[Any]:
        gain = op("Where", op("Greater", gain, floor), gain, zero)
        choice = op("ArgMax", op("Add", gain, left), axis=1, keepdims=1)
        at = op("GatherElements", gain, choice, axis=1)  # [B, 1]
        own = op("Unsqueeze", _row(op, factor, choice), op.ints([2]))  # [B, k, 1]
        before = op("Squeeze", op("MatMul", factor, own), op.ints([2]))  # [B, N]
        column = op("Div", op("Sub", _row(op, entries, choice), before), op("Sqrt", op("Max", at, tiny)))
        column = op("Where", op("Greater", at, zero), column, zero)
        wide = op("Unsqueeze", column, op.ints([2]))
        factor = op("Where", op("Equal", places, number), wide, factor)
        return [op("Sub", gain, op("Mul", column, column)), factor, _marked(op, left, positions, choice)]

    _, _, left = _loop(t, k, [diagonal, factor, last], step)
    return _picked(t, op("Less", left, op.constant(-_PICKED / 2, np.float32)), positions, k)


def _positions(op: Any, like: Any) -> Any:
    """int64 ``[N]`` of a ``[B, N]``."""
    depth = op("Squeeze", op("Shape", like, start=1, end=2))
    return op("Range", op.constant(0, _INT), depth, op.constant(1, _INT))


def _last_resort(op: Any, unary: Any) -> Any:
    return op("Max", unary, op.constant(-1e30, np.float32))


def _marked(op: Any, left: Any, positions: Any, choice: Any) -> Any:
    return op("Where", op("Equal", positions, choice), op.constant(-_PICKED, np.float32), left)


def _row(op: Any, table: Any, choice: Any) -> Any:
    """Rows ``[B, M]`` of ``[B, N, M]`` at ``[B, 1]``."""
    rows = op("GatherND", table, op("Unsqueeze", choice, op.ints([2])), batch_dims=1)
    return op("Squeeze", rows, op.ints([1]))


def _picked(t: Translator, flags: Any, positions: Any, k: Any) -> Any:
    """Recover the set: picked tokens first, in order of position."""
    op = t.op
    depth = op("Squeeze", op("Shape", positions))
    mark = op("Cast", flags, to=int(_INT))
    key = op("Sub", op("Mul", mark, op("Add", depth, op.constant(1, _INT))), positions)
    return op("TopK", key, t.size_vector(k), outputs=2, axis=1, largest=1, sorted=1)[1]


def _loop(
    t: Translator, k: Any, states: Sequence[Any], step: Callable[..., list[Any]], *, done: int = 0
) -> tuple[Any, ...]:
    """Repeat a step on float states.

    Args:
        t: The translator.
        k: How many picks in all.
        states: Before.
        step: Called with the recorder of the body, the number of the pick and the states; returns the states behind it.
        done: Picks that are made already.
    """
    count = t.size(k)
    if isinstance(count, int):
        trips = t.op.constant(count - done, _INT)
    else:
        trips = t.op("Squeeze", t.op("Sub", count, t.op.ints([done])) if done else count)
    scope = f"{t.op.scope}/loop"
    number = ir.Value(name=t.op.unique(f"{scope}/step"), shape=ir.Shape([]), type=ir.TensorType(_INT))
    going = ir.Value(name=t.op.unique(f"{scope}/going"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    held = [
        ir.Value(name=t.op.unique(f"{scope}/state"), type=ir.TensorType(ir.DataType.FLOAT), shape=state.shape)
        for state in states
    ]
    body = SubgraphRecorder(t.op, scope)
    results = step(body, number, *held)
    on = body("Identity", going)
    graph = body.graph([number, going, *held], [on, *results], [ir.DataType.BOOL] + [ir.DataType.FLOAT] * len(held))
    made = t.op("Loop", trips, t.op.constant(True, ir.DataType.BOOL), *states, outputs=len(held), body=graph)
    return made if isinstance(made, tuple) else (made,)


LOWERINGS: dict[Any, Any] = {
    ops.greedy_select.default: greedy_select,
    ops.cover_select.default: cover_select,
    ops.dpp_select.default: dpp_select,
}
