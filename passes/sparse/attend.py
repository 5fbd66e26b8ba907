"""The sparse attention of a layer, beside the dense one that short calls keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tokcc.passes.sparse.compressed import attend_among
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.plan import PlannedSparse, sized

__all__ = ["attend_sparsely"]

ops = torch.ops.tokcc


def attend_sparsely(cut: SparseCut, planned: PlannedSparse, dense: Any) -> Any:
    """Return what the queries attend to, ``[B, H, S, Dv]``.

    Args:
        cut: The call.
        planned: What to do.
        dense: The same with all keys: what calls get that the plan is not for.
    """
    b = cut.b
    with b.inserting(f"{planned.name}@{cut.layer}"):
        asked = cut.of_last() if planned.single else cut
        score = None
        if planned.score is not None and planned.select.rates(cut.layer):
            score = planned.score.emit(asked)
            large = {size: _in_larger(asked, size) for size in planned.select.larger}
            asked = replace(asked, larger={size: (own, planned.score.emit(own)) for size, own in large.items()})
        low, high = planned.bounds
        if planned.select.compresses:
            made = attend_among(cut, planned.select.tokens(cut, score, planned.budget))
            sizes = [cut.new, cut.total, cut.past]
            return b.call(ops.choose_by_size.default, dense, made, sizes, [*low, 0], [*high, 0])
        if planned.select.attends:
            made = planned.select.attended(asked, score, planned.budget)
        else:
            chosen = cut.lists[cut.layer] = planned.select.select(asked, score, planned.budget)
            if planned.select.reads_all(cut.layer):
                return dense
            made = _listed(asked, chosen, planned)
        if planned.single:  # as many as there are where this is read: one
            made = b.expand(made, [-1, -1, cut.new, -1])
        else:  # padding sees no key: what it attends to would be the mean of whatever a block is filled up with
            made = b.where(b.unsqueeze(b.unsqueeze(cut.real_rows, 1), 3), made, 0.0)
        return b.call(ops.choose_by_size.default, dense, made, [cut.new, cut.total], low, high)


def _in_larger(cut: SparseCut, size: int) -> SparseCut:
    """Return a call in blocks of so many times as many keys."""
    states = {name: cut.states[sized(name, size)] for name in cut.states if sized(name, size) in cut.states}
    return replace(cut, block_k=cut.block_k * size, states=states)


def _listed(cut: SparseCut, chosen: BlockList, planned: PlannedSparse) -> Any:
    """Attend to listed blocks."""
    key, value = cut.buffers or (cut.key, cut.value)
    return cut.b.call(
        ops.block_sparse_attention.default,
        cut.query,
        key,
        value,
        chosen.index,
        chosen.count,
        planned.block_q,
        planned.block_k,
        True,
        cut.scale,
        cut.real,
        cut.softcap,
        *(() if cut.bias is None else (cut.bias,)),
    )
