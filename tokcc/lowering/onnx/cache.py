"""What stays of a cache, in standard operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.recorder import Recorder, SubgraphRecorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

ops = torch.ops.tokcc
assert tokcc.kernels is not None
_INT = ir_dtype(torch.int64)


def gather_slots(t: Translator, node: fx.Node, x: Any, index: Any) -> Any:
    """Rows per sample and head."""
    del node
    rank = index.meta["val"].ndim
    t.passages.takes(t.value(index), x.meta["val"].shape[2])
    return t.op("GatherND", t.value(x), t.op("Unsqueeze", t.value(index), t.op.ints([rank])), batch_dims=2)


def retain_slots(t: Translator, node: fx.Node, rating: Any, k: Any) -> Any:
    """Two sorts; where at most one entry goes, as in every step of a generation, the lowest one is found instead."""
    del node
    value, wanted = t.value(rating), t.size_vector(k)
    if not t.target.branches:
        return _sorted_best(t.op, value, wanted)
    total = t.axis(rating, 2)
    few = t.op("LessOrEqual", t.op("Sub", total, wanted), t.op.ints([1]))
    # There is no lowest one of no slots at all.
    few = t.op("Squeeze", t.op("And", few, t.op("Greater", total, t.op.ints([0]))), t.op.ints([0]))
    nothing = t.op("Equal", wanted, total)
    place = t.op("Range", t.op.constant(0, _INT), t.op("Squeeze", wanted, t.op.ints([0])), t.op.constant(1, _INT))
    one, many = (SubgraphRecorder(t.op, f"{t.op.scope}/{name}") for name in ("one", "many"))
    index = t.op(
        "If",
        few,
        then_branch=one.graph([], [_without_lowest(one, value, nothing, place, total)], [_INT]),
        else_branch=many.graph([], [_sorted_best(many, value, wanted)], [_INT]),
    )
    t.passages.selects(index, nothing, rating.meta["val"].shape[2])
    return index


def _without_lowest(op: Recorder, rating: Any, nothing: Any, place: Any, total: Any) -> Any:
    # Of equal ratings the last one goes. When nothing goes, the slots in front of L are all of them.
    lowest = op("ArgMin", rating, axis=2, keepdims=1, select_last_index=1)  # [B, H, 1]
    gone = op("Where", nothing, total, lowest)
    behind = op("Cast", op("GreaterOrEqual", place, gone), to=int(_INT))  # [B, H, K]
    return op("Add", place, behind)


def _sorted_best(op: Recorder, rating: Any, wanted: Any) -> Any:
    # Which entries are the best does not need their order: that makes the first sort several times faster.
    best = op("TopK", rating, wanted, outputs=2, axis=2, largest=1, sorted=0)[1]
    return op("TopK", best, wanted, outputs=2, axis=2, largest=0, sorted=1)[0]


LOWERINGS: dict[Any, Any] = {
    ops.gather_slots.default: gather_slots,
    ops.retain_slots.default: retain_slots,
}
