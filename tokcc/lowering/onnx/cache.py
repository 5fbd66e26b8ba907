"""Cached attention and cache gathers in standard operations.

Measured choices: queries of one key head side by side, so that keys are never repeated; a plain product for a few
queries and blocks of queries that read only their prefix for many (half the time of one large product, and a fiftieth
of its memory); the attention that slots received as one product with the probabilities that are there anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.recorder import Recorder, SubgraphRecorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

ops = torch.ops.tokcc
assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)
_FLOAT = ir_dtype(torch.float32)

BLOCK = 64
"""Queries in a block."""
PLAIN = 256
"""Up to so many queries one product is faster than blocks."""


def gather_slots(t: Translator, node: fx.Node, x: Any, index: Any) -> Any:
    """Rows per sample and head."""
    del node
    rank = index.meta["val"].ndim
    return t.op("GatherND", t.value(x), t.op("Unsqueeze", t.value(index), t.op.ints([rank])), batch_dims=2)


def retain_slots(t: Translator, node: fx.Node, rating: Any, k: Any) -> Any:
    """Two sorts; where at most one entry goes, as in every step of a generation, the lowest one is found instead."""
    del node
    value, wanted = t.value(rating), t.size_vector(k)
    total = t.op("Shape", value, start=2, end=3)
    few = t.op("Squeeze", t.op("LessOrEqual", t.op("Sub", total, wanted), t.op.ints([1])), t.op.ints([0]))
    one, many = (SubgraphRecorder(t.op, f"{t.op.scope}/{name}") for name in ("one", "many"))
    return t.op(
        "If",
        few,
        then_branch=one.graph([], [_without_lowest(one, value, wanted, total)], [_INT]),
        else_branch=many.graph([], [_sorted_best(many, value, wanted)], [_INT]),
    )


def _without_lowest(op: Recorder, rating: Any, wanted: Any, total: Any) -> Any:
    # Of equal ratings the last one goes. When nothing goes, the slots in front of L are all of them.
    lowest = op("ArgMin", rating, axis=2, keepdims=1, select_last_index=1)  # [B, H, 1]
    gone = op("Where", op("Equal", wanted, total), total, lowest)
    place = _range(op, op.constant(0, _INT), _scalar(op, wanted))
    behind = op("Cast", op("GreaterOrEqual", place, gone), to=int(_INT))  # [B, H, K]
    return op("Add", place, behind)


def _sorted_best(op: Recorder, rating: Any, wanted: Any) -> Any:
    # Which entries are the best does not need their order: that makes the first sort several times faster.
    best = op("TopK", rating, wanted, outputs=2, axis=2, largest=1, sorted=0)[1]
    return op("TopK", best, wanted, outputs=2, axis=2, largest=0, sorted=1)[0]


@dataclass(frozen=True)
class _Attention:
    """The operands of one attention as ONNX values; sizes are int64 vectors of one element."""

    query: Any  # [B, H, S, D], scaled
    key: Any  # [B, Hkv, L, D]
    value: Any  # [B, Hkv, L, Dv]
    real: Any  # bool [B, L]
    past: Any
    new: Any
    total: Any
    heads: int
    kv_heads: int
    query_width: int
    width: int
    window: int
    softcap: float
    dtype: ir.DataType
    lowest: float
    sums: bool

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads


def cached_attention(
    t: Translator,
    node: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    real: Any,
    window: int,
    scale: float,
    softcap: float,
) -> Any:
    """Grouped attention; blocks of queries where there are many."""
    fake, keys = query.meta["val"], key.meta["val"]
    dtype = fake.dtype
    sums = any(user.args[1] == 1 and user.users for user in node.users)
    q, k = t.value(query), t.value(key)
    new, total = (t.op("Shape", x, start=2, end=3) for x in (q, k))
    a = _Attention(
        query=t.op("Mul", q, t.value(scale, dtype)),
        key=k,
        value=t.value(value),
        real=t.value(real),
        past=t.op("Sub", total, new),
        new=new,
        total=total,
        heads=int(fake.shape[1]),
        kv_heads=int(keys.shape[1]),
        query_width=int(fake.shape[3]),
        width=int(value.meta["val"].shape[3]),
        window=window,
        softcap=softcap,
        dtype=ir_dtype(dtype),
        lowest=float(torch.finfo(dtype).min),
        sums=sums,
    )
    rows = fake.shape[2]
    if isinstance(rows, int):
        results = _plain(t.op, a) if rows <= PLAIN else _blocks(t.op, a)
    else:
        few = t.op("LessOrEqual", t.op("Squeeze", new, t.op.ints([0])), t.op.constant(PLAIN, _INT))
        plain, blocks = (SubgraphRecorder(t.op, f"{t.op.scope}/{name}") for name in ("plain", "blocks"))
        kinds = [a.dtype, _FLOAT][: 1 + sums]
        results = t.op(
            "If",
            few,
            outputs=1 + sums,
            then_branch=plain.graph([], _plain(plain, a), kinds),
            else_branch=blocks.graph([], _blocks(blocks, a), kinds),
        )
        results = results if isinstance(results, tuple) else (results,)
    out = results[0]
    received = results[1] if sums else None
    return out, received


def _plain(op: Recorder, a: _Attention) -> tuple[Any, ...]:
    """All queries at once."""
    slot = _range(op, op.constant(0, _INT), _scalar(op, a.total))
    own = op("Add", _range(op, op.constant(0, _INT), _scalar(op, a.new)), _scalar(op, a.past))
    out, sums = _attend(op, a, a.query, a.key, a.value, a.real, own, slot, a.new, a.total)
    return (out, sums) if a.sums else (out,)


def _attend(
    op: Recorder,
    a: _Attention,
    query: Any,
    key: Any,
    value: Any,
    real: Any,
    own: Any,
    slot: Any,
    rows: Any,
    length: Any,
) -> tuple[Any, Any]:
    """Attend with R queries at the slots ``own`` over ``length`` slots.

    Returns:
        ``[B, H, R, Dv]``, and the attention that the slots received ``[B, Hkv, length]`` or None.
    """
    grouped = op("Reshape", query, op.ints([0, a.kv_heads, -1, a.query_width]))  # [B, Hkv, G * R, D]
    logits = op("MatMul", grouped, op("Transpose", key, perm=[0, 1, 3, 2]))
    if a.softcap:
        cap = op.constant(a.softcap, a.dtype)
        logits = op("Mul", op("Tanh", op("Div", logits, cap)), cap)
    column, row = op("Unsqueeze", slot, op.ints([0])), op("Unsqueeze", own, op.ints([1]))
    seen = op("LessOrEqual", column, row)  # [R, length]
    if a.window:
        near = op("Greater", column, op("Sub", row, op.constant(a.window, _INT)))
        seen = op("And", seen, near)
    allowed = op("Or", op("And", seen, op("Unsqueeze", real, op.ints([1]))), op("Equal", column, row))  # [B, R, length]
    mask = op("Where", allowed, op.constant(0.0, a.dtype), op.constant(a.lowest, a.dtype))
    mask = op("Unsqueeze", mask, op.ints([1, 2]))  # [B, 1, 1, R, length]
    split = op("Concat", op.ints([0, a.kv_heads, a.groups]), rows, length, axis=0)
    joined = op("Concat", op.ints([0, a.kv_heads, -1]), length, axis=0)
    probs = op("Softmax", op("Add", op("Reshape", logits, split), mask), axis=-1)
    flat = op("Reshape", probs, joined)  # [B, Hkv, G * R, length]
    out = op("Reshape", op("MatMul", flat, value), op.ints([0, a.heads, -1, a.width]))
    if not a.sums:
        return out, None
    # Rows of padding count nothing; the mean over the group is part of the weight.
    counted = op("Cast", op("Gather", a.real, own, axis=1), to=int(_FLOAT))  # [B, R]
    weight = op("Div", op("Unsqueeze", counted, op.ints([1, 2])), op.constant(float(a.groups), _FLOAT))
    repeated = op("Tile", weight, op.ints([1, 1, 1, a.groups]))  # [B, 1, 1, G * R]
    table = flat if a.dtype == _FLOAT else op("Cast", flat, to=int(_FLOAT))
    return out, op("Squeeze", op("MatMul", repeated, table), op.ints([2]))


def _blocks(op: Recorder, a: _Attention) -> tuple[Any, ...]:
    """A loop over blocks of queries, each of which reads only the slots up to its last query."""
    zero = op.constant(0, _INT)
    size = op.constant(BLOCK, _INT)
    new = _scalar(op, a.new)
    trips = op("Div", op("Add", new, op.constant(BLOCK - 1, _INT)), size)
    missing = op("Unsqueeze", op("Sub", op("Mul", trips, size), new), op.ints([0]))
    # The last block is filled up with queries of zeros, which are cut off again.
    pads = op("Concat", op.ints([0, 0, 0, 0, 0, 0]), missing, op.ints([0]), axis=0)
    filled = op("Pad", a.query, pads, op.constant(0.0, a.dtype))
    real = op(
        "Concat",
        a.real,
        op(
            "Expand",
            op.constant([[False]], ir.DataType.BOOL),
            op("Concat", op("Shape", a.real, start=0, end=1), missing, axis=0),
        ),
        axis=1,
    )
    name = f"{op.scope}/loop"
    step = ir.Value(name=op.unique(f"{name}/step"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    going = ir.Value(name=op.unique(f"{name}/going"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    held = ir.Value(name=op.unique(f"{name}/received"), type=ir.TensorType(_FLOAT), shape=ir.Shape([None, None, None]))
    body = SubgraphRecorder(op, name)
    start = body("Mul", step, size)
    first = body("Unsqueeze", start, op.ints([0]))
    behind = body("Add", first, op.ints([BLOCK]))
    length = body("Min", body("Add", a.past, behind), a.total)
    query = body("Slice", filled, first, behind, op.ints([2]))
    key, value = (body("Slice", x, op.ints([0]), length, op.ints([2])) for x in (a.key, a.value))
    known = body("Slice", a.real, op.ints([0]), length, op.ints([1]))
    slot = _range(body, zero, _scalar(body, length))
    own = body("Add", _range(body, zero, size), body("Add", start, _scalar(body, a.past)))
    inner = replace(a, real=real)
    out, sums = _attend(body, inner, query, key, value, known, own, slot, op.ints([BLOCK]), length)
    on = body("Identity", going)
    carried, inputs, results, kinds = [], [step, going], [on], [ir.DataType.BOOL]
    if a.sums:
        rest = body("Sub", a.total, length)
        padded = body("Pad", sums, body("Concat", op.ints([0, 0, 0, 0, 0]), rest, axis=0), op.constant(0.0, _FLOAT))
        inputs.append(held)
        results.append(body("Add", held, padded))
        kinds.append(_FLOAT)
        shape = op("Concat", op("Shape", a.key, start=0, end=2), a.total, axis=0)
        carried = [op("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=_FLOAT))]
    graph = body.graph(inputs, [*results, out], [*kinds, a.dtype])
    made = op("Loop", trips, op.constant(True, ir.DataType.BOOL), *carried, outputs=1 + a.sums, body=graph)
    stacked = made[-1] if isinstance(made, tuple) else made  # [trips, B, H, block, Dv]
    rows = op("Reshape", op("Transpose", stacked, perm=[1, 2, 0, 3, 4]), op.ints([0, a.heads, -1, a.width]))
    out = op("Slice", rows, op.ints([0]), a.new, op.ints([2]))
    return (out, made[0]) if a.sums else (out,)


def _scalar(op: Recorder, vector: Any) -> Any:
    return op("Squeeze", vector, op.ints([0]))


def _range(op: Recorder, start: Any, stop: Any) -> Any:
    return op("Range", start, stop, op.constant(1, _INT))


LOWERINGS: dict[Any, Any] = {
    ops.cached_attention.default: cached_attention,
    ops.gather_slots.default: gather_slots,
    ops.retain_slots.default: retain_slots,
}
