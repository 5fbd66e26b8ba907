"""Attention among some tokens of a call, others for every head; the rest attend to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokcc.passes.cache.runs import run_from
from tokcc.passes.sparse.cut import SparseCut

__all__ = ["TokenSets", "attend_among"]

aten = torch.ops.aten
ops = torch.ops.tokcc


@dataclass(frozen=True)
class TokenSets:
    """The tokens of a call that take part in the attention of each query head.

    Attributes:
        index: int64 ``[B, H, K]``, ascending places among the call's tokens; padding stands in front.
        real: bool ``[B, K]``: what is no padding.
    """

    index: Any
    real: Any


def attend_among(cut: SparseCut, sets: TokenSets) -> Any:
    """Return what the queries attend to, ``[B, H, S, Dv]``: zeros for tokens that take no part.

    Only the call's own keys are read: this is for calls with nothing in the cache.
    """
    b = cut.b
    batch, kept = b.size(cut.query, 0), b.size(sets.index, 2)
    group = cut.heads // cut.kv_heads
    by_group = b.reshape(sets.index, [batch, cut.kv_heads, b.mul_sizes(kept, group)])

    def taken(x: Any) -> Any:
        own = b.call(ops.gather_slots.default, run_from(b, x, 2, cut.past, cut.new), by_group)
        return b.reshape(own, [batch, cut.heads, kept, int(b.shape(x)[3])])

    query = b.call(ops.gather_slots.default, cut.query, sets.index)
    key, value = taken(cut.key), taken(cut.value)
    both = b.call(ops.cached_attention.default, query, key, value, sets.real, 0, cut.scale, cut.softcap)
    made = b.parts(both, 2)[0]  # [B, H, K, Dv]
    made = b.mul(made, b.unsqueeze(b.unsqueeze(b.cast(sets.real, b.dtype(made)), 1), 3))
    # Every token reads its own result, or the zeros in front.
    nothing = b.full([batch, cut.heads, 1, b.size(made, 3)], 0.0, b.dtype(made), made)
    number = b.expand(b.add(b.arange(kept, made), 1), [batch, cut.heads, kept])
    own = b.full([batch, cut.heads, cut.new], 0, torch.int64, made)
    own = b.scatter(own, 2, sets.index, number)
    return b.call(ops.gather_slots.default, b.cat([nothing, made], 2), own)
