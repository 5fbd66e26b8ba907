"""Blocks by coarse logits, relative to exact ones of the first and the near keys."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import prefix
from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.piece import SparseScore
from tokcc.passes.sparse.ranking import ranked

__all__ = ["EstimatedRatio"]

aten = torch.ops.aten
ops = torch.ops.tokcc

_LEAST = 1e-30
"""Smallest largest number of a query or key: of zeros the codes are zeros."""
_HIGHEST = 50.0
"""Largest logarithm of a ratio: e to it is still below what must be read."""
_NOTHING = 1e-30
"""Smallest ratio of what is seen: above a threshold of 0."""


class EstimatedRatio(SparseScore):
    """The largest ``exp(s - m) / l`` of a block, of coarse logits s (SALE, arXiv:2505.24179).

    m and l are the maximum and the sum of a query's softmax over its reference, which is read in any case: the first
    blocks, those in front of its row, and the row's own, with exact logits. The coarse logits are products of queries
    and keys in few bits. Both lose their mean first: that of the keys (the call's and the cache's) shifts all logits of
    a query alike, so that the reference is without it, too; what that of the queries gives to a key is added again,
    exactly. Each query and key has a scale of its own: ``round(x * n / max|x|)``, halves to even, n of 7 for 4 bits.
    Codes stand in the graph as floats of the model's type: what 4 bits would save takes a kernel of their own.

    A cap of the logits is left out on both sides. Ratings are positive for every block of which something is seen.

    Attributes:
        bits: Of a code, the sign among them.
        sinks: First blocks of a sample, as the selector has them.
        local: Blocks in front of the own ones, likewise.
    """

    kind: ClassVar[str] = "estimated_ratio"

    bits: int = Field(default=4, ge=2, le=16)
    sinks: int = Field(default=0, ge=0)
    local: int = Field(default=0, ge=0)

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        key = b.sub(cut.key, _mean(b, cut.key, cut.real))  # [B, Hkv, L, D]
        mean = _mean(b, cut.query, cut.real_rows)  # [B, H, 1, D]
        by_key = b.mul(b.squeeze(cut.products(mean, key), 2), cut.scale)  # [B, H, L]
        asked = b.mul(self._coarse(b, b.sub(cut.query, mean)), cut.scale)
        ratio = b.call(
            ops.block_maxima.default,
            asked,
            self._coarse(b, key),
            self._by_query(cut, key),
            by_key,
            cut.real,
            cut.block_q,
            cut.block_k,
        )
        return b.clamp_min(b.exp(b.call(aten.clamp_max.default, ratio, _HIGHEST)), _NOTHING)

    def _coarse(self, b: Builder, x: Any) -> Any:
        """Return ``[B, heads, N, D]`` as its codes say, in its own type."""
        steps, wide = float(2 ** (self.bits - 1) - 1), b.cast(x, torch.float32)
        step = b.div(b.clamp_min(b.amax(b.call(aten.abs.default, wide), 3, keepdim=True), _LEAST), steps)
        codes = b.call(aten.clamp.default, b.call(aten.round.default, b.div(wide, step)), -steps, steps)
        return b.cast(b.mul(codes, step), b.dtype(x))

    def _by_query(self, cut: SparseCut, key: Any) -> Any:
        """Return minus the logarithm of each query's sum over its reference, fp32 ``[B, H, S]``; for padding the least.

        Args:
            cut: The call.
            key: ``[B, Hkv, L, D]`` without their mean.
        """
        b = cut.b
        logits, seen = self._reference(cut, key)
        top = b.amax(b.where(seen, logits, HIDDEN), 4, keepdim=True)
        mass = b.sum(b.mul(b.exp(b.sub(b.where(seen, logits, top), top)), b.cast(seen, torch.float32)), 4)
        whole = b.add(b.squeeze(top, 4), b.log(b.clamp_min(mass, _NOTHING)))  # [B, H, MQ, block_q]
        flat = prefix(b, b.call(aten.flatten.using_ints, whole, 2, 3), 2, cut.new)
        return b.where(b.unsqueeze(cut.real_rows, 1), b.mul(flat, -1.0), HIDDEN)

    def _reference(self, cut: SparseCut, key: Any) -> tuple[Any, Any]:
        """Return the logits of the reference, fp32 ``[B, H, MQ, block_q, K]``, and which of them are meant."""
        b, block = cut.b, cut.block_k
        batch, width = b.size(key, 0), int(b.shape(key)[3])
        table = b.where(cut.edges(self.sinks, self.local), 1.0, HIDDEN)
        table = b.expand(table, [batch, 1, cut.rows, cut.blocks])
        most = b.min_sizes(self.sinks + self.local + -(-cut.block_q // block) + 1, cut.blocks)
        values, places = ranked(cut, table, most)
        places = b.reshape(places, [batch, 1, b.mul_sizes(cut.rows, most)])
        # What a key is called: its slot and 1; 0 where there is none.
        names = b.where(cut.real, b.add(cut.slots, 1), 0)  # [B, L]
        named = b.call(ops.gather_slots.default, b.unsqueeze(cut.by_key(names, 1), 1), places)  # [B, 1, MQ * K, block]
        named = b.reshape(named, [batch, 1, cut.rows, most, block])
        taken = b.unsqueeze(b.compare("gt", values, HIDDEN / 2), 4)
        named = b.call(aten.flatten.using_ints, b.mul(named, b.cast(taken, torch.int64)), 3, 4)
        own = cut.by_query(b.add(cut.own_slots, 1), 0)  # [MQ, block_q]
        seen = b.logical_and(
            b.compare("gt", b.unsqueeze(named, 3), 0), b.compare("le", b.unsqueeze(named, 3), b.unsqueeze(own, 2))
        )
        blocks = b.call(aten.flatten.using_ints, cut.in_blocks(key), 3, 4)  # [B, Hkv, M, block * D]
        every = b.expand(places, [batch, cut.kv_heads, b.mul_sizes(cut.rows, most)])
        keys = b.reshape(
            b.call(ops.gather_slots.default, blocks, every),
            [batch, cut.kv_heads, 1, cut.rows, b.mul_sizes(most, block), width],
        )
        asked = cut.grouped(cut.query_blocks)  # [B, Hkv, G, MQ, block_q, D]
        logits = b.cast(b.matmul(asked, b.transpose(keys, 4, 5)), torch.float32)
        return b.mul(b.call(aten.flatten.using_ints, logits, 1, 2), cut.scale), seen


def _mean(b: Builder, x: Any, real: Any) -> Any:
    """Return the mean of ``[B, heads, N, D]`` over what is real, bool ``[B, N]``: ``[B, heads, 1, D]``."""
    counted = b.unsqueeze(b.unsqueeze(b.cast(real, torch.float32), 1), 3)
    many = b.clamp_min(b.sum(counted, 2, keepdim=True), 1.0)
    return b.cast(b.div(b.sum(b.mul(b.cast(x, torch.float32), counted), 2, keepdim=True), many), b.dtype(x))
