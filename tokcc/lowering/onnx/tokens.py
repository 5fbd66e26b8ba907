"""The ``tokcc::`` operations in standard ones: the forms that are fast in ONNX Runtime and accepted elsewhere.

Measured choices: GatherND with batch_dims over GatherElements for rows, a one-hot product over the merged tokens only
over scatter-add, TopK on int64 to restore order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.algebra import additive_mask, probabilities
from tokcc.lowering.onnx.indexing import main_diagonal
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

ops = torch.ops.tokcc
assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)


def _rows(t: Translator, x: Any, index: Any) -> Any:
    """Gather rows ``[B, N, ...]`` by ``[B, K]``."""
    return t.op("GatherND", x, t.op("Unsqueeze", index, t.op.ints([2])), batch_dims=1)


def gather_tokens(t: Translator, node: fx.Node, x: Any, index: Any, dim: int, batch_dim: int) -> Any:
    """Rows per sample; a table shared by all samples needs no copy per sample."""
    del node
    fake = x.meta["val"]
    dim, batch_dim = dim % fake.ndim, batch_dim % fake.ndim
    value, chosen = t.value(x), t.value(index)
    samples = index.meta["val"].shape[0]
    shared = isinstance(fake.shape[batch_dim], int) and fake.shape[batch_dim] == 1
    if shared and not (isinstance(samples, int) and samples == 1):
        # [.., 1, .., N, ..] -> Gather on N with [B, K] puts (B, K) where N was.
        flat = t.op("Squeeze", value, t.op.ints([batch_dim]))
        axis = dim - 1 if batch_dim < dim else dim
        taken = t.op("Gather", flat, chosen, axis=axis)
        rank = fake.ndim
        rest = [i for i in range(rank) if i not in (axis, axis + 1)]
        perm: list[int] = []
        for place in range(rank):
            perm.append(axis if place == batch_dim else axis + 1 if place == dim else rest.pop(0))
        return taken if perm == list(range(rank)) else t.op("Transpose", taken, perm=perm)
    if (batch_dim, dim) == (0, 1):
        return _rows(t, value, chosen)
    front = [batch_dim, dim, *(i for i in range(fake.ndim) if i not in (batch_dim, dim))]
    taken = _rows(t, t.op("Transpose", value, perm=front), chosen)
    return t.op("Transpose", taken, perm=[front.index(i) for i in range(fake.ndim)])


def scatter_tokens(t: Translator, node: fx.Node, base: Any, index: Any, values: Any) -> Any:
    """ScatterND without reduction; indices are unique."""
    del node
    chosen = t.value(index)
    zero, one = t.op.constant(0, _INT), t.op.constant(1, _INT)
    samples = t.op("Range", zero, t.op("Squeeze", t.op("Shape", chosen, start=0, end=1)), one)
    rows = t.op("Expand", t.op("Unsqueeze", samples, t.op.ints([1])), t.op("Shape", chosen))
    pairs = t.op("Concat", t.op("Unsqueeze", rows, t.op.ints([2])), t.op("Unsqueeze", chosen, t.op.ints([2])), axis=2)
    return t.op("ScatterND", t.value(base), pairs, t.value(values))


def merge_tokens(
    t: Translator, node: fx.Node, x: Any, weight: Any, keep: Any, source: Any, slot: Any, first: Any, padded: bool
) -> Any:
    """``x_kept * (w_kept / total) + share @ x_source``: one product with the one-hot of the merged tokens' slots.

    The product runs over all kept rows: it is small beside the copies that leaving out untouched rows would need.
    """
    del node
    dtype = x.meta["val"].dtype
    value, keep_v, slot_v = t.value(x), t.value(keep), t.value(slot)
    slots = keep.meta["val"].shape[1]
    kept_rows = t.op("Unsqueeze", keep_v, t.op.ints([2]))
    source_rows = t.op("Unsqueeze", t.value(source), t.op.ints([2]))
    base = t.op("GatherND", value, kept_rows, batch_dims=1)  # [B, K, C]
    moved = t.op("GatherND", value, source_rows, batch_dims=1)  # [B, R, C]
    before = t.size(first)
    if isinstance(slots, int) and isinstance(before, int):
        places = t.op.constant(np.arange(-before, slots - before)[:, None], _INT)  # [K, 1]
    else:
        size = t.op("Squeeze", t.op("Shape", keep_v, start=1, end=2))
        row = t.op("Range", t.op.constant(0, _INT), size, t.op.constant(1, _INT))
        places = t.op("Unsqueeze", t.op("Sub", row, t.value(first, torch.int64)), t.op.ints([1]))
    hot = t.op("Equal", t.op("Unsqueeze", slot_v, t.op.ints([1])), places)  # [B, K, R]
    hot = t.op("Cast", hot, to=int(ir_dtype(dtype)))
    if weight is None:
        own = t.value(1.0, dtype)
        total = t.op("Add", t.op("ReduceSum", hot, t.op.ints([2]), keepdims=1), own)  # [B, K, 1]
        divisor = total
    else:
        weights = t.op("Unsqueeze", t.value(weight, dtype), t.op.ints([2]))  # [B, N, 1]
        own = t.op("GatherND", weights, kept_rows, batch_dims=1)  # [B, K, 1]
        mass = t.op("GatherND", weights, source_rows, batch_dims=1)  # [B, R, 1]
        total = t.op("Add", own, t.op("MatMul", hot, mass))
        moved = t.op("Mul", moved, mass)
        divisor = t.op("Max", total, t.value(float(torch.finfo(dtype).tiny), dtype)) if padded else total
    joined = t.op("MatMul", t.op("Div", hot, divisor), moved)  # [B, K, C]
    merged = t.op("Add", t.op("Mul", base, t.op("Div", own, divisor)), joined)
    return merged, t.op("Squeeze", total, t.op.ints([2]))


def topk_select(t: Translator, node: fx.Node, score: Any, k: Any, ascending: bool) -> Any:
    """TopK, whose ties go to the lower position; ascending order by a second TopK on the positions."""
    del node
    size = t.size_vector(k)
    chosen = t.op("TopK", t.value(score), size, outputs=2, axis=1, largest=1, sorted=1)[1]
    if not ascending:
        return chosen
    return t.op("TopK", chosen, size, outputs=2, axis=1, largest=0, sorted=1)[0]


def attention_probs(t: Translator, node: fx.Node, query: Any, key: Any, mask: Any, scale: float) -> Any:
    """The same nodes as the attention's own, so that asking for all rows costs nothing beside it."""
    dtype = node.meta["val"].dtype
    added = None if mask is None else additive_mask(t, mask, dtype)
    return probabilities(t, t.value(query), t.value(key), added, float(scale), dtype, 4)


def attention_columns(
    t: Translator, node: fx.Node, query: Any, key: Any, mask: Any, votes: Any, scale: float, others: bool
) -> Any:
    """The map of the attention itself, which is there already, times the votes."""
    probs, dtype = attention_probs(t, node, query, key, mask, scale), node.meta["val"].dtype
    if votes is None:
        sums = t.op("ReduceSum", probs, t.op.ints([2]), keepdims=0)
    else:
        counted = t.op("Unsqueeze", t.value(votes, dtype), t.op.ints([1, 2]))  # [B, 1, 1, R]
        sums = t.op("Squeeze", t.op("MatMul", counted, probs), t.op.ints([2]))
    if not others:
        return sums
    square = (*query.meta["val"].shape[:3], key.meta["val"].shape[2])
    own = main_diagonal(t, node, probs, square, dtype)  # [B, H, N]
    if votes is not None:
        own = t.op("Mul", own, t.op("Unsqueeze", t.value(votes, dtype), t.op.ints([1])))
    return t.op("Sub", sums, own)


LOWERINGS: dict[Any, Any] = {
    ops.gather_tokens.default: gather_tokens,
    ops.scatter_tokens.default: scatter_tokens,
    ops.merge_tokens.default: merge_tokens,
    ops.topk_select.default: topk_select,
    ops.attention_columns.default: attention_columns,
    ops.attention_probs.default: attention_probs,
}
