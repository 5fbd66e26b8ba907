"""Average evicted entries into the nearest kept ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.cache.merging import evicted, kept_mask, merge, receivers
from tokcc.passes.cache.piece import CacheReducer, ReducedCache

__all__ = ["NearestMean"]

aten = torch.ops.aten
_FAR = 2**40


class NearestMean(CacheReducer):
    """Each entry that a text loses joins the kept entry nearest to it (Elastic Cache, arXiv:2407.18121).

    Nearest by slot, which is by position as long as nothing was evicted before; ties to the older one. Keys and values
    become plain means, the kept entry included. Protected entries receive nothing. What a single token pushes out is
    dropped.
    """

    kind: ClassVar[str] = "nearest_mean"
    changes: ClassVar[bool] = True

    def reduce(self, cut: CacheCut, retained: Retained) -> ReducedCache:
        """See :class:`NearestMean`."""
        b, index = cut.b, retained.index
        kept = kept_mask(cut, index)
        anchors = receivers(cut, kept)
        place, some = self._nearest(cut, index, kept, anchors)
        joins = b.logical_and(some, b.unsqueeze(cut.real, 1))
        weight = b.cast(b.logical_or(kept, joins), torch.float32)
        lost = b.sub_sizes(cut.total, b.size(index, 2))
        nothing = b.full([b.size(cut.key, 0), cut.kv_heads, cut.total], 0.0, torch.float32, cut.key)
        source = evicted(cut, kept, nothing, lost)
        own = b.gather(b.cat([place, b.slice(place, 2, 0, 1)], 2), 2, source)
        return merge(cut, index, source, own, weight)

    def _nearest(self, cut: CacheCut, index: Any, kept: Any, anchors: Any) -> tuple[Any, Any]:
        """Return which kept entry is the nearest anchor of each slot, int64 ``[B, Hkv, L]``, and whether there is one.

        Between padding, sinks and recent entries the anchors are one run of the kept entries.
        """
        b = cut.b
        marks = b.cast(anchors, torch.int64)
        upto = b.call(aten.cumsum.default, marks, 2)  # anchors up to a slot
        count = b.sum(marks, 2, keepdim=True)
        front = b.unsqueeze(b.compare("lt", cut.rank(), cut.sinks), 1)  # padding has rank -1
        first = b.sum(b.cast(b.logical_and(kept, front), torch.int64), 2, keepdim=True)
        behind = b.add(first, upto)
        last = b.amax(b.arange(b.size(index, 2), cut.key), 0, keepdim=True)

        def slot_at(place: Any) -> Any:
            return b.gather(index, 2, b.call(aten.minimum.default, b.clamp_min(place, 0), last))

        slot = cut.slots()
        older = b.where(b.compare("gt", upto, 0), b.sub(slot, slot_at(b.sub(behind, 1))), _FAR)
        newer = b.where(b.compare("lt", upto, count), b.sub(slot_at(behind), slot), _FAR)
        place = b.where(b.compare("lt", newer, older), behind, b.sub(behind, 1))
        inside = b.call(aten.minimum.default, b.clamp_min(place, 0), last)
        return inside, b.compare("gt", count, 0)
