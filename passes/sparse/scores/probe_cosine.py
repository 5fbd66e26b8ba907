"""Blocks by the angle between a probe of the queries and the keys that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import WHOLE, PageState, Touched
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore
from tokcc.passes.sparse.running import Moments, moments, through

__all__ = ["ProbeCosine"]

aten = torch.ops.aten

_BLOCKS, _RUNNING = "key_block", "key_running"
_LEAST = 1e-4
"""Mean bias of a row below which its tokens are alike: the rest is what rounding leaves."""
_FLAT = 1e-8
"""Smallest variance that counts, as a share of the mean square."""
_FAR = 1e30


class ProbeCosine(SparseScore):
    """ActQKV (arXiv:2502.13542): the cosine of a row's probe query and a block's representative, as one of all heads.

    The probe is a mean of the row's queries in which those count more that are unlike what was seen: a query ``h_t`` of
    all heads weighs ``mean over channels c of (h_tc - mu_c)^2 / (var_c + mean(var) / 100)``, brought to the sum 1. Mean
    and variance are of all tokens up to the row's end, joined row by row by the pooled formula. Rows of equal queries,
    and those with fewer than ``warm`` rows in front, have the plain mean; a single query is its own probe.

    A block is represented by the mean of those of its keys, ``representatives`` of them for each key head, that get
    most from the ``near`` tokens behind each: the sum of the products with their queries, those of all heads that share
    the key.

    What is remembered: of each block the representative and what its keys have got so far, fp32
    ``[B, Hkv, blocks, D + block]``; mean and variance of the queries of the text, fp32 ``[B, H, 1, 2 * D]``.

    Attributes:
        representatives: Keys of a block that stand for it.
        near: Tokens behind a key whose queries say how much it gets.
        warm: Rows in front from which on queries are weighted.
    """

    kind: ClassVar[str] = "probe_cosine"
    wants_queries: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True

    representatives: int = Field(default=4, ge=1)
    near: int = Field(default=512, ge=1)
    warm: int = Field(default=1, ge=0)
    _group: int = PrivateAttr(default=1)  # query heads of a key head

    def fitted(self, sizes: Mapping[str, int]) -> Self:
        """See :class:`SparseScore`."""
        made = self.model_copy()
        made._group = sizes["query_heads"] // sizes["heads"]
        return made

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        del block_q
        if block_k < max(self.representatives, 2):
            raise ValueError(f"blocks of at least {max(self.representatives, 2)} keys, not of {block_k}")

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        del dtype
        return (
            PageState(_BLOCKS, kv_heads, width + block, block, torch.float32, reach=self.near),
            PageState(_RUNNING, kv_heads * self._group, 2 * width, WHOLE, torch.float32),
        )

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        del layer
        assert pages.asked is not None
        asked = pages.asked
        call = moments(b, b.unsqueeze(asked.query, 2), b.unsqueeze(asked.real, 1))
        text = through(b, _split(b, asked.seen, pages.held[_RUNNING]), call)
        return {_BLOCKS: self._blocks(b, pages), _RUNNING: b.cat([text.mean, text.variance], 3)}

    def _blocks(self, b: Builder, pages: Touched) -> Any:
        """Return the rows of blocks, ``[B, Hkv, R, D + block]``."""
        asked = pages.asked
        assert asked is not None
        key = b.cast(pages.key, torch.float32)  # [B, Hkv, R, block, D]
        sizes = [b.size(key, axis) for axis in range(5)]
        kv_heads, width = int(b.shape(key)[1]), int(b.shape(key)[4])
        query = b.mul(b.cast(asked.query, torch.float32), _wide(b, asked.real))
        group = int(b.shape(query)[1]) // kv_heads
        query = b.sum(b.reshape(query, [sizes[0], kv_heads, group, asked.new, width]), 2)  # [B, Hkv, S, D]
        nothing = b.full([sizes[0], kv_heads, 1, width], 0.0, torch.float32, query)
        sums = b.cat([nothing, b.call(aten.cumsum.default, query, 2)], 2)  # [B, Hkv, S + 1, D]
        behind = b.call(aten.sub.Tensor, b.add(pages.slot, 1), asked.past)  # [R, block]

        def up_to(token: Any) -> Any:
            place = b.call(aten.clamp_max.default, b.call(aten.clamp_min.default, token, 0), asked.new)
            return b.call(aten.index.Tensor, sums, [None, None, place])

        from_those = b.sub(up_to(b.add(behind, self.near)), up_to(behind))  # [B, Hkv, R, block, D]
        fresh = b.div(b.sum(b.mul(from_those, key), 4), float(self.near))
        held = b.slice(pages.held[_BLOCKS], 3, width, None)
        earlier = b.unsqueeze(b.unsqueeze(b.compare("le", behind, 0), 0), 0)
        real = b.unsqueeze(pages.real, 1)
        got = b.where(real, b.add(fresh, b.where(earlier, held, 0.0)), 0.0)  # [B, Hkv, R, block]
        best = b.call(aten.topk.default, b.where(real, got, -_FAR), self.representatives, 3, True, True)
        values, places = b.parts(best, 2)
        taken = b.cast(b.compare("gt", values, -_FAR / 2), torch.float32)
        index = b.expand(b.unsqueeze(places, 4), [*sizes[:3], self.representatives, width])
        chosen = b.mul(b.gather(key, 3, index), b.unsqueeze(taken, 4))
        many = b.unsqueeze(b.clamp_min(b.sum(taken, 3), 1.0), 3)
        return b.cat([b.div(b.sum(chosen, 3), many), got], 3)

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        width, group = int(b.shape(cut.query)[3]), cut.heads // cut.kv_heads
        probe = b.cast(cut.query, torch.float32) if cut.block_q == 1 else self._probe(cut)  # [B, H, MQ, D]
        blocks = b.slice(cut.states[_BLOCKS], 3, 0, width)
        products = cut.of_blocks(b.sum(cut.products(probe, blocks), 1, keepdim=True))  # [B, 1, MQ, M]
        length = b.mul(b.sum(b.sum(b.mul(blocks, blocks), 3), 1, keepdim=True), float(group))
        length = b.unsqueeze(cut.of_blocks(length), 2)  # [B, 1, 1, M]
        own = b.unsqueeze(b.sum(b.sum(b.mul(probe, probe), 3), 1, keepdim=True), 3)  # [B, 1, MQ, 1]
        both = b.mul(b.sqrt(b.clamp_min(length, 1e-20)), b.sqrt(b.clamp_min(own, 1e-20)))
        return b.div(products, both)

    def _probe(self, cut: SparseCut) -> Any:
        """Return the probe of every row, fp32 ``[B, H, MQ, D]``."""
        b = cut.b
        query = b.cast(cut.query_blocks, torch.float32)  # [B, H, MQ, block, D]
        real = cut.by_query(cut.real_rows, 1)  # [B, MQ, block]
        rows = moments(b, query, real)
        text = through(b, _split(b, cut.seen, cut.before[_RUNNING]), rows)
        level = b.mean(b.mean(text.variance, 3, True), 1, True)  # [B, 1, MQ, 1]
        square = b.mean(b.mean(b.mul(text.mean, text.mean), 3, True), 1, True)
        least = b.clamp_min(b.mul(b.add(square, level), _FLAT), 1e-30)
        scale = b.call(aten.maximum.default, b.add(text.variance, b.div(level, 100.0)), least)
        apart = b.sub(query, b.unsqueeze(text.mean, 3))
        unlike = b.mean(b.mean(b.div(b.mul(apart, apart), b.unsqueeze(scale, 3)), 4), 1)  # [B, MQ, block]
        counted = b.cast(real, torch.float32)
        unlike = b.mul(unlike, counted)
        whole = b.sum(unlike, 2, keepdim=True)
        many = b.unsqueeze(b.clamp_min(rows.count, 1.0), 2)
        told = b.compare("gt", whole, b.mul(many, _LEAST))
        if self.warm:
            warm = b.compare("ge", b.sub(text.count, rows.count), self.warm * cut.block_q)
            told = b.logical_and(told, b.unsqueeze(warm, 2))
        weight = b.where(told, b.div(unlike, b.clamp_min(whole, 1e-30)), b.div(counted, many))
        return b.squeeze(b.matmul(b.unsqueeze(b.unsqueeze(weight, 1), 3), query), 3)


def _split(b: Builder, seen: Any, held: Any) -> Moments:
    """Return what was held of a text as numbers of one part."""
    width = int(b.shape(held)[3]) // 2
    return Moments(seen, b.slice(held, 3, 0, width), b.slice(held, 3, width, None))


def _wide(b: Builder, real: Any) -> Any:
    """Return bool ``[B, N]`` as fp32 ``[B, 1, N, 1]``."""
    return b.unsqueeze(b.unsqueeze(b.cast(real, torch.float32), 1), 3)
