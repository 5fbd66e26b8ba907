"""Fuse everything that was ever evicted into one entry."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.cache.merging import kept_mask
from tokcc.passes.cache.piece import CacheReducer, ReducedCache
from tokcc.passes.cache.storage import Front

__all__ = ["FuseFront"]


class FuseFront(CacheReducer):
    """Drop, and keep the mean of all dropped entries in front of the others (RazorAttention, arXiv:2407.15891).

    The entry in front stands for as many tokens as were dropped: the attention adds the logarithm of their number to
    its logit. If all of them were equal, nothing would be lost. Until something is dropped it has no weight.
    """

    kind: ClassVar[str] = "fuse_front"
    changes: ClassVar[bool] = True
    fronted: ClassVar[bool] = True

    def reduce(self, cut: CacheCut, retained: Retained) -> ReducedCache:
        """See :class:`FuseFront`."""
        b = cut.b
        stays = b.add(retained.index, 1)  # in the whole cut
        first = b.full([b.size(cut.key, 0), cut.kv_heads, 1], 0, torch.int64, cut.key)
        known = kept_mask(cut, b.cat([first, stays], 2))
        gone = b.logical_and(b.logical_not(known), b.unsqueeze(cut.real, 1))  # [B, Hkv, L]
        before = b.slice(cut.weight, 2, 0, 1)  # [B, Hkv, 1]
        # The front itself counts as many times as it stands for.
        count = b.cat([before, b.slice(b.mul(b.cast(gone, torch.float32), cut.weight), 2, 1, None)], 2)
        total = b.sum(count, 2, keepdim=True)
        share = b.unsqueeze(b.div(count, b.clamp_min(total, 1.0)), 2)  # [B, Hkv, 1, L]
        key, value = (b.cast(b.matmul(share, b.cast(x, torch.float32)), b.dtype(x)) for x in (cut.key, cut.value))
        op = torch.ops.tokcc.gather_slots.default
        front = Front(key, value, total)
        return ReducedCache(b.call(op, cut.key, stays), b.call(op, cut.value, stays), front=front)
