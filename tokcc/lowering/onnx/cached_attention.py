"""Cached attention in standard operations.

Measured choices: queries of one key head side by side, so that keys are never repeated; a plain product for a few
queries and blocks of queries that read only their prefix for many (half the time of one large product, and a fiftieth
of its memory); one mask for all layers that see the same; the attention that slots received as one product with the
probabilities that are there anyway.
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

assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)
_FLOAT = ir_dtype(torch.float32)

BLOCK = 64
"""Queries in a block."""
PLAIN = 256
"""Up to so many queries one product is faster than blocks."""


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
    bias: Any = None  # [B, Hkv, L]

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
    bias: Any = None,
) -> Any:
    """Grouped attention; blocks of queries where there are many."""
    fake, keys = query.meta["val"], key.meta["val"]
    dtype = fake.dtype
    sums = any(user.args[1] == 1 and user.users for user in node.users)
    q, k = t.value(query), t.value(key)
    new, total = t.axis(query, 2), t.axis(real, 1)
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
        bias=None if bias is None else t.op("Cast", t.value(bias), to=int(ir_dtype(dtype))),
    )
    before = len(t.op.nodes)
    rows = fake.shape[2]
    if not t.target.free_loops or (isinstance(rows, int) and rows <= PLAIN):
        results = _plain(t.op, a, _visible(t.op, a))
    elif isinstance(rows, int):
        results = _blocks(t.op, a)
    else:
        few = t.op("LessOrEqual", t.op("Squeeze", new, t.op.ints([0])), t.op.constant(PLAIN, _INT))
        visible = _shared_mask(t, few, a)
        plain, blocks = (SubgraphRecorder(t.op, f"{t.op.scope}/{name}") for name in ("plain", "blocks"))
        kinds = [a.dtype, _FLOAT][: 1 + sums]
        results = t.op(
            "If",
            few,
            outputs=1 + sums,
            then_branch=plain.graph([], _plain(plain, a, visible), kinds),
            else_branch=blocks.graph([], _blocks(blocks, a), kinds),
        )
        results = results if isinstance(results, tuple) else (results,)
    t.passages.attentions.append(t.op.nodes[before:])
    for result, kind in zip(results, [a.dtype, _FLOAT], strict=False):
        result.type = ir.TensorType(kind)
    return results[0], results[1] if sums else None


@dataclass(frozen=True)
class _Mask:
    """What queries see: they stand beside each other by query head of the group, and then by row.

    Attributes:
        add: ``[B, 1, G * R, length]``, added to the logits.
        counted: fp32 ``[B, 1, 1, G * R]``: what each query counts in the sum over all of them; None = not wanted.
    """

    add: Any
    counted: Any


def _shared_mask(t: Translator, few: Any, a: _Attention) -> _Mask:
    """Return the mask of the plain form, made once for all layers that see the same; nothing in it for many queries."""
    key = ("cached_attention mask", few, a.real, a.new, a.total, a.groups, a.window, a.dtype, a.sums)

    def make() -> Any:
        one, none = (SubgraphRecorder(t.op, f"{t.op.scope}/{name}") for name in ("mask", "no_mask"))
        made = _visible(one, a)
        unused = none.constant([[[[0.0]]]], a.dtype), none.constant([[[[0.0]]]], _FLOAT)
        kinds = [a.dtype, _FLOAT][: 1 + a.sums]
        return t.op(
            "If",
            few,
            outputs=len(kinds),
            then_branch=one.graph([], [made.add, made.counted][: len(kinds)], kinds),
            else_branch=none.graph([], list(unused)[: len(kinds)], kinds),
        )

    made = t.once(key, make)
    return _Mask(*made) if a.sums else _Mask(made, None)


def _visible(op: Recorder, a: _Attention) -> _Mask:
    """Return the mask of all queries."""
    slot = _range(op, op.constant(0, _INT), _scalar(op, a.total))
    own = op("Add", _range(op, op.constant(0, _INT), _scalar(op, a.new)), _scalar(op, a.past))
    return _mask(op, a, a.real, own, slot)


def _mask(op: Recorder, a: _Attention, real: Any, own: Any, slot: Any) -> _Mask:
    """Return the mask of R queries at the slots ``own`` over the slots ``slot``, some of which are real."""
    every = own if a.groups == 1 else op("Tile", own, op.ints([a.groups]))  # [G * R]
    column, row = op("Unsqueeze", slot, op.ints([0])), op("Unsqueeze", every, op.ints([1]))
    seen = op("LessOrEqual", column, row)  # [G * R, length]
    if a.window:
        near = op("Greater", column, op("Sub", row, op.constant(a.window, _INT)))
        seen = op("And", seen, near)
    allowed = op("Or", op("And", seen, op("Unsqueeze", real, op.ints([1]))), op("Equal", column, row))
    add = op("Where", allowed, op.constant(0.0, a.dtype), op.constant(a.lowest, a.dtype))
    add = op("Unsqueeze", add, op.ints([1]))  # [B, 1, G * R, length]
    if not a.sums:
        return _Mask(add, None)
    # Rows of padding count nothing; the mean over the group is part of the weight.
    counted = op("Cast", op("Gather", a.real, every, axis=1), to=int(_FLOAT))  # [B, G * R]
    counted = op("Div", counted, op.constant(float(a.groups), _FLOAT))
    return _Mask(add, op("Unsqueeze", counted, op.ints([1, 2])))


def _plain(op: Recorder, a: _Attention, mask: _Mask) -> tuple[Any, ...]:
    """All queries at once."""
    out, sums = _attend(op, a, a.query, a.key, a.value, a.bias, mask)
    return (out, sums) if a.sums else (out,)


def _attend(op: Recorder, a: _Attention, query: Any, key: Any, value: Any, bias: Any, mask: _Mask) -> tuple[Any, Any]:
    """Attend with R queries.

    Returns:
        ``[B, H, R, Dv]``, and the attention that the slots received ``[B, Hkv, length]`` or None.
    """
    grouped = op("Reshape", query, op.ints([0, a.kv_heads, -1, a.query_width]))  # [B, Hkv, G * R, D]
    logits = op("MatMul", grouped, op("Transpose", key, perm=[0, 1, 3, 2]))
    if a.softcap:
        cap = op.constant(a.softcap, a.dtype)
        logits = op("Mul", op("Tanh", op("Div", logits, cap)), cap)
    if bias is not None:
        logits = op("Add", logits, op("Unsqueeze", bias, op.ints([2])))
    probs = op("Softmax", op("Add", logits, mask.add), axis=-1)  # [B, Hkv, G * R, length]
    out = op("Reshape", op("MatMul", probs, value), op.ints([0, a.heads, -1, a.width]))
    if not a.sums:
        return out, None
    table = probs if a.dtype == _FLOAT else op("Cast", probs, to=int(_FLOAT))
    return out, op("Squeeze", op("MatMul", mask.counted, table), op.ints([2]))


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
    bias = None if a.bias is None else body("Slice", a.bias, op.ints([0]), length, op.ints([2]))
    slot = _range(body, zero, _scalar(body, length))
    own = body("Add", _range(body, zero, size), body("Add", start, _scalar(body, a.past)))
    inner = replace(a, real=real)
    out, sums = _attend(body, inner, query, key, value, bias, _mask(body, inner, known, own, slot))
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


LOWERINGS: dict[Any, Any] = {torch.ops.tokcc.cached_attention.default: cached_attention}
