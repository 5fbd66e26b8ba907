"""The largest logit of each block of queries and keys, in standard operations.

A loop over blocks of queries, each of which meets only the blocks of keys up to its last query: the memory is that of
one block's logits, and the work half of the map's.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.block_sparse_attention import blocks_of, each_row
from tokcc.lowering.onnx.recorder import Recorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)
_FLOAT = ir_dtype(torch.float32)
_BOOL = ir.DataType.BOOL
_LOWEST = -1e30


def block_maxima(
    t: Translator,
    node: fx.Node,
    query: Any,
    key: Any,
    query_bias: Any,
    key_bias: Any,
    valid: Any,
    block_q: int,
    block_k: int,
) -> Any:
    """A loop over blocks of queries."""
    del node
    op, fake = t.op, query.meta["val"]
    dtype, heads, width = ir_dtype(fake.dtype), int(fake.shape[1]), int(fake.shape[3])
    kv_heads = int(key.meta["val"].shape[1])
    rows, length = t.axis(query, 2), t.axis(key, 2)
    if not t.target.free_loops:
        q, k, of_rows, of_keys, known = (t.value(x) for x in (query, key, query_bias, key_bias, valid))
        sizes, blocks = (heads, kv_heads, width), (block_q, block_k)
        return _every_row(op, q, k, of_rows, of_keys, known, rows, length, sizes, blocks, dtype)
    queries = blocks_of(op, t.value(query), rows, 2, 4, block_q, dtype)  # [B, H, MQ, block_q, D]
    of_rows = blocks_of(op, t.value(query_bias), rows, 2, 3, block_q, _FLOAT)  # [B, H, MQ, block_q]
    keys = blocks_of(op, t.value(key), length, 2, 4, block_k, dtype)  # [B, Hkv, M, block_k, D]
    of_keys = blocks_of(op, t.value(key_bias), length, 2, 3, block_k, _FLOAT)  # [B, H, M, block_k]
    known = blocks_of(op, t.value(valid), length, 1, 2, block_k, _BOOL)  # [B, M, block_k]
    past, many = op("Sub", length, rows), op("Shape", keys, start=2, end=3)
    one, none = op.ints([1]), op.ints([0])
    lowest = op.constant(_LOWEST, _FLOAT)

    def row(body: Recorder, step: Any) -> Any:
        start = body("Unsqueeze", body("Mul", step, op.constant(block_q, _INT)), none)
        end = body("Min", body("Add", body("Add", past, start), op.ints([block_q])), length)
        read = body("Div", body("Add", end, op.ints([block_k - 1])), op.ints([block_k]))  # blocks up to the last query
        key, bias, real = (body("Slice", x, none, read, axis) for x, axis in
                           ((keys, op.ints([2])), (of_keys, op.ints([2])), (known, one)))  # fmt: skip
        asked = body("Reshape", body("Gather", queries, step, axis=2), op.ints([0, kv_heads, -1, width]))
        flat = body("Transpose", body("Reshape", key, op.ints([0, kv_heads, -1, width])), perm=[0, 1, 3, 2])
        logits = body("MatMul", asked, flat)  # [B, Hkv, G * block_q, n * block_k]
        logits = logits if dtype == _FLOAT else body("Cast", logits, to=int(_FLOAT))
        logits = body("Reshape", logits, body("Concat", op.ints([0, heads, block_q]), _all(body, read), axis=0))
        logits = body("Add", logits, body("Reshape", bias, op.ints([0, heads, 1, -1])))
        logits = body("Add", logits, body("Unsqueeze", body("Gather", of_rows, step, axis=2), op.ints([3])))
        # Queries that fill up the last block see nothing.
        inner = op.constant(list(range(block_q)), _INT)
        place = body("Add", start, inner)
        own = body("Where", body("Less", place, rows), body("Add", place, past), op.constant(-1, _INT))
        slots = body("Range", op.constant(0, _INT), body("Squeeze", _all(body, read), none), op.constant(1, _INT))
        earlier = body("LessOrEqual", slots, body("Unsqueeze", own, one))  # [block_q, n * block_k]
        seen = body("And", earlier, body("Reshape", real, op.ints([0, 1, 1, -1])))
        largest = body("ReduceMax", body("Where", seen, logits, lowest), op.ints([2]), keepdims=0)
        largest = body("Reshape", largest, op.ints([0, heads, -1, block_k]))
        largest = body("ReduceMax", largest, op.ints([3]), keepdims=0)
        rest = body("Sub", many, read)
        return body("Pad", largest, body("Concat", op.ints([0, 0, 0, 0, 0]), rest, axis=0), lowest)

    def _all(body: Recorder, read: Any) -> Any:
        return body("Mul", read, op.ints([block_k]))

    stacked = each_row(op, queries, _FLOAT, row)  # [MQ, B, H, M]
    return op("Transpose", stacked, perm=[1, 2, 0, 3])


def _every_row(
    op: Recorder,
    query: Any,
    key: Any,
    of_rows: Any,
    of_keys: Any,
    valid: Any,
    rows: Any,
    length: Any,
    sizes: tuple[int, int, int],
    blocks: tuple[int, int],
    dtype: ir.DataType,
) -> Any:
    """All queries at once, for runtimes without such loops: the whole map.

    Args:
        op: Records.
        query: ``[B, H, R, D]``.
        key: ``[B, Hkv, L, D]``.
        of_rows: What is added for each query, ``[B, H, R]``.
        of_keys: What is added for each key, ``[B, H, L]``.
        valid: bool ``[B, L]``.
        rows: R, int64 ``[1]``.
        length: L, the same.
        sizes: H, Hkv, D.
        blocks: Queries and keys in a block.
        dtype: Of the query.
    """
    heads, kv_heads, width = sizes
    zero, one = op.constant(0, _INT), op.constant(1, _INT)
    asked = op("Reshape", query, op.ints([0, kv_heads, -1, width]))
    logits = op("MatMul", asked, op("Transpose", key, perm=[0, 1, 3, 2]))  # [B, Hkv, G * R, L]
    logits = logits if dtype == _FLOAT else op("Cast", logits, to=int(_FLOAT))
    logits = op("Reshape", logits, op("Concat", op.ints([0, heads]), rows, length, axis=0))
    logits = op("Add", logits, op("Unsqueeze", of_keys, op.ints([2])))
    logits = op("Add", logits, op("Unsqueeze", of_rows, op.ints([3])))
    slot = op("Range", zero, op("Squeeze", length, op.ints([0])), one)
    own = op("Add", op("Range", zero, op("Squeeze", rows, op.ints([0])), one), op("Sub", length, rows))
    seen = op("And", op("LessOrEqual", slot, op("Unsqueeze", own, op.ints([1]))), op("Unsqueeze", valid, op.ints([1])))
    seen = op("Unsqueeze", seen, op.ints([1]))  # [B, 1, R, L]
    logits = op("Where", seen, logits, op.constant(_LOWEST, _FLOAT))
    # What is missing to a whole block holds nothing.
    missing = [op("Mod", op("Neg", size), op.ints([block])) for size, block in zip((rows, length), blocks, strict=True)]
    padded = op("Pad", logits, op("Concat", op.ints([0] * 6), *missing, axis=0), op.constant(_LOWEST, _FLOAT))
    many = [
        op("Div", op("Add", size, op.ints([block - 1])), op.ints([block]))
        for size, block in zip((rows, length), blocks, strict=True)
    ]
    shape = op("Concat", op.ints([0, heads]), many[0], op.ints([blocks[0]]), many[1], op.ints([blocks[1]]), axis=0)
    return op("ReduceMax", op("Reshape", padded, shape), op.ints([3, 5]), keepdims=0)


LOWERINGS: dict[Any, Any] = {torch.ops.tokcc.block_maxima.default: block_maxima}
