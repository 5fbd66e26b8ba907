"""How many tokens the slots of a cache stand for."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.cache.plan import WEIGHT
from tokcc.passes.cache.storage import Front, Held

__all__ = ["front_row", "slot_weights"]


def front_row(b: Builder, front: Front) -> Front:
    """Return the entry in front as one row: before the first call it is all zeros, of no weight."""
    weight = b.sum(front.weight, 2, keepdim=True)  # [B, Hkv, 1]
    return Front(b.sum(front.key, 2, keepdim=True), b.sum(front.value, 2, keepdim=True), weight)


def slot_weights(b: Builder, held: Held, front: Front | None, query: Any) -> tuple[Any, Any]:
    """Return how many tokens each slot stands for, fp32 ``[B, Hkv, L]``, and the logarithm; None = one each."""
    known = held.states.get(WEIGHT)
    if known is None and front is None:
        return None, None
    batch, heads = b.size(held.key, 0), int(b.shape(held.key)[1])
    if known is None:
        known = b.full([batch, heads, b.size(held.key, 2)], 1.0, torch.float32, query)
    parts = [known, b.full([batch, heads, b.size(query, 2)], 1.0, torch.float32, query)]
    weight = b.cat(parts if front is None else [front.weight, *parts], 2)
    gone = b.compare("le", weight, 0.0)
    return weight, b.where(gone, LOWEST, b.log(b.clamp_min(weight, 1e-6)))
