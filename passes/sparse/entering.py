"""The order in which the tokens of a call enter a cache whose blocks are read."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_from
from tokcc.passes.cache.visible import slot_rank
from tokcc.passes.sparse.plan import PlannedSparse

__all__ = ["in_order"]

ops = torch.ops.tokcc


def in_order(b: Builder, planned: PlannedSparse, new: tuple[Any, Any], real: Any, past: Any, total: Any) -> list[Any]:
    """Return the keys and values of a call in the order that the score wants, per head.

    What is always read keeps its place: the first blocks of a sample, the last ones of the call and the one that is not
    full; so does what fills up a block of an earlier call. Single tokens have no order.

    Args:
        b: The builder.
        planned: The sparse attention.
        new: Keys and values of the call ``[B, Hkv, S, D]``.
        real: bool ``[B, L]``: slots that are not padding.
        past: P.
        total: L.
    """
    assert planned.score is not None
    key, block = new[0], planned.block_k
    count = b.size(key, 2)
    first = run_from(b, slot_rank(b, real), 1, past, count)  # [B, S]
    slot = b.call(torch.ops.aten.add.Scalar, b.arange(count, key), past)  # [S]
    begin = b.mul_sizes(b.floordiv_sizes(b.add_sizes(past, block - 1), block), block)
    end = b.mul_sizes(b.sub_sizes(b.floordiv_sizes(total, block), planned.select.local), block)
    between = b.logical_and(b.call(torch.ops.aten.ge.Scalar, slot, begin), b.call(torch.ops.aten.lt.Scalar, slot, end))
    free = b.logical_and(b.compare("ge", first, planned.select.sinks * block), between)
    made = planned.score.order(b, key, free, block)
    same = b.expand(b.arange(count, key), [b.size(key, 0), int(b.shape(key)[1]), count])
    index = b.call(ops.choose_by_size.default, same, made, [count], [2], [2**62])
    return [b.call(ops.gather_slots.default, x, index) for x in new]
