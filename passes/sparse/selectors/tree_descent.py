"""Blocks that are found by halving the past again and again."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.runs import run_from
from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.pattern import SparsePattern

__all__ = ["TreeDescent"]

aten = torch.ops.aten
ops = torch.ops.tokcc


class TreeDescent(SparsePattern):
    """The leaves of a tree over the past of a row, of which every round keeps the best (HiP, arXiv:2406.09827).

    The blocks between the first ones and those near a row are cut into ``blocks`` spans as equal as they can be. Every
    round halves all spans and keeps the best ``blocks`` of them, rated by the largest product of a query of the row and
    the key in the middle of the span, until spans are single blocks.

    Attributes:
        blocks: Blocks that are found for a row, beside those that must be read.
        longest: Tokens for which the rounds suffice; the spans of longer sequences end longer than a block, and of each
            the first block is read.
    """

    kind: ClassVar[str] = "tree_descent"

    blocks: int = Field(default=8, ge=1)
    longest: int = Field(default=131072, ge=1)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseSelector`."""
        if self.share != "each":
            raise ValueError("`share: each`: every head finds blocks of its own")

    def table(self, cut: SparseCut) -> Any:
        """See :class:`SparsePattern`."""
        b = cut.b
        left, size = self._spans(cut)
        span = math.ceil(math.ceil(self.longest / cut.block_k) / self.blocks)
        for _ in range(math.ceil(math.log2(max(span, 1)))):
            half = b.call(aten.div.Tensor_mode, size, 2, rounding_mode="floor")
            left, size = b.cat([left, b.add(left, half)], 3), b.cat([half, b.sub(size, half)], 3)
            rating = b.where(b.compare("gt", size, 0), self._rated(cut, left, size), HIDDEN)
            best = b.parts(b.call(aten.topk.default, rating, self.blocks, -1, True, True), 2)[1]
            left, size = (b.call(aten.gather.default, x, 3, best) for x in (left, size))
        found = b.where(b.compare("gt", size, 0), b.add(left, 1), 0)  # what is no span goes in front of the first block
        wide = [*(b.size(found, axis) for axis in range(3)), b.add_sizes(cut.blocks, 1)]
        yes = b.compare("ge", found, 0)
        marked = b.scatter(b.full(wide, False, torch.bool, found), 3, found, yes)
        return run_from(b, marked, 3, 1, cut.blocks)

    def _spans(self, cut: SparseCut) -> tuple[Any, Any]:
        """Return first block and length of the spans to begin with, int64 ``[B, H, MQ, blocks]``."""
        b = cut.b
        empty = b.sum(b.cast(b.compare("eq", cut.counts, 0), torch.int64), 1, keepdim=True)  # [B, 1]
        start = b.unsqueeze(b.add(empty, self.sinks), 2)  # [B, 1, 1]
        own = b.call(aten.div.Tensor_mode, cut.first_slots, cut.block_k, rounding_mode="floor")
        length = b.sub(b.unsqueeze(b.unsqueeze(b.sub(own, self.local), 0), 2), start)
        length = b.call(aten.clamp_min.default, length, 0)  # [B, MQ, 1]
        order = b.arange(self.blocks + 1, cut.key)
        borders = b.call(aten.div.Tensor_mode, b.mul(length, order), self.blocks, rounding_mode="floor")
        borders = b.unsqueeze(b.add(start, borders), 1)  # [B, 1, MQ, blocks + 1]
        left = b.slice(borders, 3, 0, self.blocks)
        size = b.sub(b.slice(borders, 3, 1, self.blocks + 1), left)
        wide = [b.size(cut.query, 0), cut.heads, cut.rows, self.blocks]
        return b.expand(left, wide), b.expand(size, wide)

    def _rated(self, cut: SparseCut, left: Any, size: Any) -> Any:
        """Return the rating of spans ``[B, H, MQ, N]`` by their middle keys, fp32."""
        b = cut.b
        count = int(b.shape(left)[3])
        slot = b.mul(b.add(b.mul(left, 2), size), cut.block_k)
        slot = b.call(aten.div.Tensor_mode, slot, 2, rounding_mode="floor")
        slot = b.where(b.compare("gt", size, 0), slot, 0)
        batch, group = b.size(left, 0), cut.heads // cut.kv_heads
        flat = b.reshape(slot, [batch, cut.kv_heads, b.mul_sizes(cut.rows, group * count)])
        keys = b.call(ops.gather_slots.default, cut.key, flat)
        keys = b.reshape(keys, [batch, cut.heads, cut.rows, count, int(b.shape(cut.key)[3])])
        products = b.cast(b.matmul(cut.query_blocks, b.transpose(keys, 3, 4)), torch.float32)  # [B, H, MQ, block, N]
        real = b.unsqueeze(b.unsqueeze(cut.by_query(cut.real_rows, 1), 1), 4)
        return b.amax(b.where(real, products, HIDDEN), 3)
