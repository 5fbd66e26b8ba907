"""Spread of keys and values, seen from the chunk that follows them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore
from tokcc.passes.cache.ranks import places

__all__ = ["LagRelative"]

_OPEN = 1.0
"""State of an entry that has no rank yet; ranks are below it."""


class LagRelative(CacheScore):
    """Rank of an entry within its chunk, by its spread relative to the next chunk (LagKV, arXiv:2504.04704).

    Behind the sinks the sequence falls into chunks. Once the chunk behind it is complete, a chunk is rated: keys are
    scaled by the minimum and maximum of each channel over that next chunk, the standard deviation over the channels
    goes through a softmax over the chunk, the same for values, and the mean of both gives the rank, 0 (worst) up to
    ``(chunk - 1) / chunk``. The rank is final and is carried along, so that chunks shrink together while the sequence
    grows; entries without a rank stay. Reads no attention.

    Attributes:
        chunk: Tokens in a chunk.
        eps: Added to the range of a channel.
    """

    kind: ClassVar[str] = "lag_relative"
    states: ClassVar[tuple[str, ...]] = ("key_rank",)
    keeps_sinks: ClassVar[bool] = False

    chunk: int = Field(default=128, ge=1)
    eps: float = Field(default=1e-6, gt=0)

    def held(self) -> int:
        """A complete chunk waits for the next one to fill."""
        return 2 * self.chunk - 1

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`LagRelative`."""
        b, g = cut.b, self.chunk
        fresh = b.full([b.size(cut.key, 0), cut.kv_heads, cut.new], _OPEN, torch.float32, cut.key)
        state = b.cat([cut.states["key_rank"], fresh], 2)  # [B, Hkv, L]
        behind = b.logical_and(cut.real, b.compare("ge", cut.rank(), cut.sinks))  # [B, L]
        waiting = b.logical_and(b.compare("eq", state, _OPEN), b.unsqueeze(behind, 1))
        count = b.sum(b.cast(waiting, torch.int64), 2, keepdim=True)  # [B, Hkv, 1]
        last = cut.last_slot()
        start = b.sub(b.add(last, 1), count)  # first slot without a rank
        # Less than two chunks wait for their rank between calls.
        chunks = b.floordiv_sizes(b.add_sizes(cut.new, 2 * g - 1), g)
        place = b.arange(b.mul_sizes(chunks, g), cut.key)
        index = b.call(torch.ops.aten.minimum.default, b.add(start, place), last)  # [B, Hkv, chunks * g]
        spread = b.add(self._spread(cut, cut.key, index, chunks), self._spread(cut, cut.value, index, chunks))
        ranks = b.reshape(self._ranks(b, spread), [-1, cut.kv_heads, b.mul_sizes(b.sub_sizes(chunks, 1), g)])
        own = b.sub(cut.slots(), start)  # [B, Hkv, L]
        done = b.mul(b.sub(b.call(torch.ops.aten.div.Tensor_mode, count, g, rounding_mode="floor"), 1), g)
        rated = b.logical_and(b.compare("ge", own, 0), b.compare("lt", own, done))
        highest = b.sub(b.amax(place, 0, keepdim=True), g)
        at = b.call(torch.ops.aten.minimum.default, b.clamp_min(own, 0), highest)
        result = b.where(rated, b.gather(ranks, 2, at), state)
        cut.left["key_rank"] = result
        return result

    def _spread(self, cut: CacheCut, x: Any, index: Any, chunks: Any) -> Any:
        """Return ``[B, Hkv, chunks - 1, g]``: softmax of the relative standard deviation, for keys or values."""
        b = cut.b
        width = int(b.shape(x)[3])
        taken = b.cast(b.call(torch.ops.tokcc.gather_slots.default, x, index), torch.float32)
        split = b.reshape(taken, [-1, cut.kv_heads, chunks, self.chunk, width])
        chunk, following = b.slice(split, 2, 0, -1), b.slice(split, 2, 1, None)
        low, high = b.amin(following, 3, keepdim=True), b.amax(following, 3, keepdim=True)
        scaled = b.div(b.sub(chunk, low), b.add(b.sub(high, low), self.eps))
        apart = b.sub(scaled, b.mean(scaled, 4, keepdim=True))
        deviation = b.sqrt(b.div(b.sum(b.mul(apart, apart), 4), float(max(width - 1, 1))))
        return b.softmax(deviation, 3)

    def _ranks(self, b: Builder, spread: Any) -> Any:
        """Return fp32 ``[N, g]``: ranks within chunks; among equals the older entry is the better one."""
        g = self.chunk
        flat = b.reshape(spread, [-1, g])
        place = places(b, flat, g)  # 0 = best
        return b.div(b.cast(b.sub(b.mul(place, -1), 1 - g), torch.float32), float(g))
