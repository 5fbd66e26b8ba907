"""Attention to listed blocks of keys, in standard operations.

Measured choices: a loop over blocks of queries, whose memory does not grow with the list; the query heads that share a
list side by side, so that keys are gathered once for all of them; only as many blocks as the longest list of the row. A
single block of queries needs no loop, and takes keys from where they are held: nothing as long as the cache is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.recorder import Recorder, SubgraphRecorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS", "blocks_of", "each_row"]

ops = torch.ops.tokcc
assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)
_BOOL = ir.DataType.BOOL
_NEVER = 2**40
"""The place of a key that nobody sees."""


def blocks_of(op: Recorder, x: Any, size: Any, axis: int, rank: int, block: int, dtype: ir.DataType) -> Any:
    """Fill an axis up to a multiple of ``block`` and cut it: ``[..., blocks, block, ...]``.

    Args:
        op: Records.
        x: The tensor.
        size: Its size on the axis, int64 ``[1]``.
        axis: Not negative.
        rank: Its axes.
        block: Elements of a block.
        dtype: Its type.
    """
    known = None if size.const_value is None else int(size.const_value.numpy()[0])
    shape, behind = op.ints([*([0] * axis), -1, block]), rank - axis - 1
    if behind:
        shape = op("Concat", shape, op("Shape", x, start=axis + 1, end=rank), axis=0)
    if known is not None and known % block == 0:
        return op("Reshape", x, shape)
    missing = op("Mod", op("Neg", size), op.ints([block]))
    pads = op("Concat", op.ints([0] * (rank + axis)), missing, *([op.ints([0] * behind)] if behind else []), axis=0)
    return op("Reshape", op("Pad", x, pads, op.constant(False if dtype == _BOOL else 0, dtype)), shape)


def each_row(op: Recorder, queries: Any, dtype: ir.DataType, make: Callable[[Recorder, Any], Any]) -> Any:
    """Loop over blocks of queries.

    Args:
        op: Records.
        queries: ``[B, H, MQ, ...]``.
        dtype: Of what is made.
        make: Records what a block gives, from a recorder of its own and the number of the block.

    Returns:
        What the blocks give, one behind the other on a first axis.
    """
    trips = op("Squeeze", op("Shape", queries, start=2, end=3), op.ints([0]))
    name = f"{op.scope}/loop"
    step = ir.Value(name=op.unique(f"{name}/step"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    going = ir.Value(name=op.unique(f"{name}/going"), shape=ir.Shape([]), type=ir.TensorType(_BOOL))
    body = SubgraphRecorder(op, name)
    out = make(body, step)
    graph = body.graph([step, going], [body("Identity", going), out], [_BOOL, dtype])
    return op("Loop", trips, op.constant(True, _BOOL), body=graph)


def split_blocks(t: Translator, node: fx.Node, x: Any, axis: int, block: int) -> Any:
    """Pad and Reshape."""
    del node
    fake = x.meta["val"]
    return blocks_of(t.op, t.value(x), t.axis(x, axis), axis, fake.ndim, block, ir_dtype(fake.dtype))


@dataclass(frozen=True)
class _Attention:
    """The operands of one attention as ONNX values; sizes are int64 vectors of one element.

    Attributes:
        key: Blocks ``[B, Hkv, M, block, D]``, or ``[B, Hkv, N, D]`` as they are held.
        value: The same with Dv.
        known: bool ``[B, L]``, in blocks like the keys; None = all may be seen.
        past: P.
        length: L.
        heads: H.
        kv_heads: Hkv.
        groups: Lists, or key heads.
        own: Every query head has a list.
        widths: D, Dv.
        block_q: Queries in a block.
        block_k: Keys in a block.
        causal: See the operation.
        softcap: As above.
        blocked: Whether keys are in blocks.
        longest: Read no more blocks than the longest list of the row has; otherwise as many as a list has room for.
        dtype: Of keys.
        lowest: Half of the lowest number: added to a logit it stays a number.
        bias: Of each key, like the keys with a width of 1; None = none.
    """

    key: Any
    value: Any
    known: Any
    past: Any
    length: Any
    heads: int
    kv_heads: int
    groups: int
    own: bool
    widths: tuple[int, int]
    block_q: int
    block_k: int
    causal: bool
    softcap: float
    blocked: bool
    longest: bool
    dtype: ir.DataType
    lowest: float
    bias: Any


def block_sparse_attention(
    t: Translator,
    node: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    index: Any,
    count: Any,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Any = None,
    softcap: float = 0.0,
    bias: Any = None,
) -> Any:
    """A loop over blocks of queries, or the only one."""
    del node
    op, fake = t.op, query.meta["val"]
    dtype = ir_dtype(fake.dtype)
    heads, kv_heads, lists = (int(x.meta["val"].shape[1]) for x in (query, key, index))
    widths = int(fake.shape[3]), int(value.meta["val"].shape[3])
    rows, length = t.axis(query, 2), (t.axis(key, 2) if valid is None else t.axis(valid, 1))
    # Heads that have a list of their own get keys of their own; a list of all heads is read once for each key head.
    own = lists == heads and heads != kv_heads
    groups = heads if own else kv_heads
    table, counts = (t.value(x, torch.int64) for x in (index, count))
    if lists == 1 and groups > 1:
        table = op("Tile", table, op.ints([1, groups, 1, 1]))
        counts = op("Tile", counts, op.ints([1, groups, 1]))
    only = isinstance(fake.shape[2], int) and fake.shape[2] <= block_q
    held, slots = [t.value(x) for x in (key, value)], key.meta["val"].shape[2]
    # Filling up the last block copies all keys: of many blocks of queries it is the smaller part.
    blocked = not only or (isinstance(slots, int) and slots % block_k == 0)
    if blocked:
        held = [blocks_of(op, x, t.axis(key, 2), 2, 4, block_k, dtype) for x in held]  # [B, Hkv, M, block, D]
    added = None if bias is None else op("Unsqueeze", t.value(bias, fake.dtype), op.ints([3]))  # [B, Hkv, L, 1]
    if added is not None and blocked:
        added = blocks_of(op, added, t.axis(bias, 2), 2, 4, block_k, dtype)
    known = None if valid is None else t.value(valid)
    if known is not None and not only:
        known = blocks_of(op, known, length, 1, 2, block_k, _BOOL)  # [B, M, block]
    a = _Attention(
        key=held[0],
        value=held[1],
        known=known,
        past=op("Sub", length, rows),
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        groups=groups,
        own=own,
        widths=widths,
        block_q=int(fake.shape[2]) if only else block_q,
        block_k=block_k,
        causal=causal,
        softcap=softcap,
        blocked=blocked,
        longest=t.target.lengths_by_value,
        dtype=dtype,
        lowest=float(torch.finfo(fake.dtype).min) / 2,
        bias=added,
    )
    asked = op("Mul", t.value(query), t.value(scale, fake.dtype))
    if only:
        first = op.ints([0])
        listed, blocks = (op("Squeeze", x, op.ints([2])) for x in (counts, table))
        return _row(op, a, asked, listed, blocks, first, only)
    queries = blocks_of(op, asked, rows, 2, 4, block_q, dtype)

    def attend(body: Recorder, step: Any) -> Any:
        row, listed, blocks = (body("Gather", x, step, axis=2) for x in (queries, counts, table))
        return _row(body, a, row, listed, blocks, body("Mul", step, op.constant(block_q, _INT)), only)

    if not t.target.free_loops:
        return op("Slice", _every_row(op, a, queries, counts, table), op.ints([0]), rows, op.ints([2]))
    stacked = each_row(op, queries, dtype, attend)  # [trips, B, H, block, Dv]
    flat = op("Reshape", op("Transpose", stacked, perm=[1, 2, 0, 3, 4]), op.ints([0, heads, -1, widths[1]]))
    return op("Slice", flat, op.ints([0]), rows, op.ints([2]))


def _row(op: Recorder, a: _Attention, query: Any, listed: Any, blocks: Any, start: Any, only: bool) -> Any:
    """Attend with one block of queries.

    Args:
        op: Records.
        a: The attention.
        query: ``[B, H, block, D]``.
        listed: How many blocks of keys are meant, ``[B, Hs]``.
        blocks: Which, ``[B, Hs, K]``.
        start: Place of the first query in the call.
        only: Whether there is no other block of queries.

    Returns:
        ``[B, H, block, Dv]``.
    """
    never, size = op.constant(_NEVER, _INT), op.constant(a.block_k, _INT)
    if a.longest:
        most = op("Reshape", op("ReduceMax", listed, keepdims=0), op.ints([1]))
        blocks = op("Slice", blocks, op.ints([0]), most, op.ints([2]))  # [B, Hs, n]
    else:
        most = op("Shape", blocks, start=2, end=3)
    inner = op.constant(list(range(a.block_k)), _INT)
    # Where every key stands; those that are not meant stand where nobody sees them.
    rank = op("Range", op.constant(0, _INT), op("Squeeze", most, op.ints([0])), op.constant(1, _INT))
    meant = op("Less", rank, op("Unsqueeze", listed, op.ints([2])))
    first = op("Where", meant, op("Mul", blocks, size), never)
    slots = op("Add", op("Unsqueeze", first, op.ints([3])), inner)  # [B, Hs, n, block]
    last = op("Sub", a.length, op.ints([1]))
    safe = None
    if only and (a.known is not None or not a.blocked):
        # All that is listed exists, but for the end of the last block.
        safe = op("Min", op("Add", op("Unsqueeze", op("Mul", blocks, size), op.ints([3])), inner), last)
    if a.known is not None:
        flat = op("Reshape", blocks if safe is None else safe, op.ints([0, -1, 1]))
        seen = op("Reshape", op("GatherND", a.known, flat, batch_dims=1), op.ints([0, a.groups, -1, a.block_k]))
        slots = op("Where", seen, slots, never)
    slots = op("Reshape", slots, op.ints([0, a.groups, 1, 1, -1]))  # [B, Hs, 1, 1, n * block]
    if a.causal and a.block_q == 1 and only:
        allowed = op("LessOrEqual", slots, last)
    elif a.causal:
        begin = op("Add", start, a.past)
        allowed = op("LessOrEqual", slots, op("Add", begin, op.constant([[i] for i in range(a.block_q)], _INT)))
    else:
        allowed = op("LessOrEqual", slots, last)
    mask = op("Where", allowed, op.constant(0.0, a.dtype), op.constant(a.lowest, a.dtype))
    places = blocks if a.blocked else op("Reshape", safe, op.ints([0, a.groups, -1]))
    places = _with_head(op, places, a.groups, a.heads // a.kv_heads) if a.own else op("Unsqueeze", places, op.ints([3]))
    keys, values, bias = (
        x
        if x is None
        else op("Reshape", op("GatherND", x, places, batch_dims=1 if a.own else 2), op.ints([0, a.groups, -1, width]))
        for x, width in zip((a.key, a.value, a.bias), (*a.widths, 1), strict=True)
    )
    asked = op("Reshape", query, op.ints([0, a.groups, -1, a.widths[0]]))
    logits = op("MatMul", asked, op("Transpose", keys, perm=[0, 1, 3, 2]))  # [B, Hs, G * block, n * block]
    if a.softcap:
        cap = op.constant(a.softcap, a.dtype)
        logits = op("Mul", op("Tanh", op("Div", logits, cap)), cap)
    if bias is not None:
        logits = op("Add", logits, op("Transpose", bias, perm=[0, 1, 3, 2]))
    span = op("Shape", slots, start=4, end=5)
    split = op("Concat", op.ints([0, a.groups, -1, a.block_q]), span, axis=0)
    probs = op("Softmax", op("Add", op("Reshape", logits, split), mask), axis=-1)
    joined = op("Reshape", probs, op("Concat", op.ints([0, a.groups, -1]), span, axis=0))
    return op("Reshape", op("MatMul", joined, values), op.ints([0, a.heads, a.block_q, a.widths[1]]))


def _every_row(op: Recorder, a: _Attention, queries: Any, listed: Any, blocks: Any) -> Any:
    """Attend with all blocks of queries at once: every key is copied for each list that names it.

    Args:
        op: Records.
        a: The attention; keys are in blocks.
        queries: ``[B, H, MQ, block, D]``.
        listed: How many blocks of keys are meant, ``[B, Hs, MQ]``.
        blocks: Which, ``[B, Hs, MQ, K]``.

    Returns:
        ``[B, H, MQ * block, Dv]``.
    """
    never, size = op.constant(_NEVER, _INT), op.constant(a.block_k, _INT)
    group, spread = a.heads // a.groups, op("Shape", blocks)
    rank = op("Range", op.constant(0, _INT), op("Squeeze", op("Shape", blocks, start=3, end=4), op.ints([0])),
              op.constant(1, _INT))  # fmt: skip
    meant = op("Less", rank, op("Unsqueeze", listed, op.ints([3])))
    first = op("Where", meant, op("Mul", blocks, size), never)
    slots = op("Add", op("Unsqueeze", first, op.ints([4])), op.constant(list(range(a.block_k)), _INT))
    if a.known is not None:
        seen = op("GatherND", a.known, op("Reshape", blocks, op.ints([0, -1, 1])), batch_dims=1)
        seen = op("Reshape", seen, op("Concat", spread, op.ints([a.block_k]), axis=0))
        slots = op("Where", seen, slots, never)  # [B, Hs, MQ, K, block]
    many = op("Shape", queries, start=2, end=3)
    slots = op("Reshape", slots, op("Concat", op.ints([0, a.groups]), many, op.ints([1, -1]), axis=0))
    row = op("Range", op.constant(0, _INT), op("Squeeze", many, op.ints([0])), op.constant(1, _INT))
    begin = op("Unsqueeze", op("Add", op("Mul", row, op.constant(a.block_q, _INT)), a.past), op.ints([1, 2]))
    # The query heads of a list stand beside each other: each has the same rows.
    inner = op.constant([[i] for _ in range(group) for i in range(a.block_q)], _INT)
    last = op("Add", begin, inner) if a.causal else op("Sub", a.length, op.ints([1]))
    allowed = op("LessOrEqual", slots, last)  # [B, Hs, MQ, G * block, K * block], or one row of them
    mask = op("Where", allowed, op.constant(0.0, a.dtype), op.constant(a.lowest, a.dtype))
    places = op("Reshape", blocks, op.ints([0, a.groups, -1]))  # [B, Hs, MQ * K]
    places = _with_head(op, places, a.groups, a.heads // a.kv_heads) if a.own else op("Unsqueeze", places, op.ints([3]))
    keys, values, bias = (
        x
        if x is None
        else op(
            "Reshape",
            op("GatherND", x, places, batch_dims=1 if a.own else 2),
            op("Concat", op.ints([0, a.groups]), many, op.ints([-1, width]), axis=0),
        )
        for x, width in zip((a.key, a.value, a.bias), (*a.widths, 1), strict=True)
    )  # [B, Hs, MQ, K * block, D]
    grouped = op("Concat", op.ints([0, a.groups, group]), many, op.ints([a.block_q, a.widths[0]]), axis=0)
    asked = op("Transpose", op("Reshape", queries, grouped), perm=[0, 1, 3, 2, 4, 5])
    asked = op("Reshape", asked, op("Concat", op.ints([0, a.groups]), many, op.ints([-1, a.widths[0]]), axis=0))
    logits = op("MatMul", asked, op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    if a.softcap:
        cap = op.constant(a.softcap, a.dtype)
        logits = op("Mul", op("Tanh", op("Div", logits, cap)), cap)
    if bias is not None:
        logits = op("Add", logits, op("Transpose", bias, perm=[0, 1, 2, 4, 3]))
    out = op("MatMul", op("Softmax", op("Add", logits, mask), axis=-1), values)  # [B, Hs, MQ, G * block, Dv]
    split = op("Concat", op.ints([0, a.groups]), many, op.ints([group, a.block_q, a.widths[1]]), axis=0)
    turned = op("Transpose", op("Reshape", out, split), perm=[0, 1, 3, 2, 4, 5])
    return op("Reshape", turned, op.ints([0, a.heads, -1, a.widths[1]]))


def _with_head(op: Recorder, blocks: Any, heads: int, group: int) -> Any:
    """Return the key head and the block of each entry, ``[B, H, n, 2]``."""
    head = op.constant([[[h // group] for h in range(heads)]], _INT)  # [1, H, 1]
    spread = op("Expand", head, op("Shape", blocks))
    return op("Concat", op("Unsqueeze", spread, op.ints([3])), op("Unsqueeze", blocks, op.ints([3])), axis=3)


def diagonal_sums(t: Translator, node: fx.Node, probs: Any) -> Any:
    """Rows written one longer than they are stand one further to the left each: columns are diagonals then."""
    del node
    op, fake = t.op, probs.meta["val"]
    rank = fake.ndim
    rows, length = t.axis(probs, rank - 2), t.axis(probs, rank - 1)
    zero = op.constant(0.0, ir_dtype(fake.dtype))
    wide = op("Pad", t.value(probs), op("Concat", op.ints([0] * (rank - 1)), rows, op.ints([0] * rank), axis=0), zero)
    flat = op("Reshape", wide, op.ints([*([0] * (rank - 2)), -1]))
    longer = op("Pad", flat, op("Concat", op.ints([0] * (2 * rank - 3)), rows, axis=0), zero)
    width = op("Add", op("Add", length, rows), op.ints([1]))
    skewed = op("Reshape", longer, op("Concat", op.ints([*([0] * (rank - 2)), -1]), width, axis=0))
    sums = op("ReduceSum", skewed, op.ints([rank - 2]), keepdims=0)  # column L - d
    return op("Slice", sums, length, op.ints([0]), op.ints([rank - 2]), op.ints([-1]))


LOWERINGS: dict[Any, Any] = {
    ops.diagonal_sums.default: diagonal_sums,
    ops.block_sparse_attention.default: block_sparse_attention,
    ops.split_blocks.default: split_blocks,
}
