"""Tokens that the model's own indexer likes best, of those in the blocks that it likes best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.capture.hf_decoder import INDEX
from tokcc.ir.builder import Builder
from tokcc.passes.budget import Count
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.runs import prefix
from tokcc.passes.sparse.cut import HIDDEN, BlockList, SparseCut
from tokcc.passes.sparse.indexed import OfIndexer
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import best_of, first_of, ranked

__all__ = ["BlocksThenTokens"]

aten = torch.ops.aten
ops = torch.ops.tokcc
_MEAN = "key_index_mean"


class BlocksThenTokens(OfIndexer, SparseSelector):
    """HISA (arXiv:2603.28458): an indexer asked about blocks first, and about the tokens of the best of them.

    A block is rated by the mean of its tokens' index keys, in the indexer's own way: what is below 0 is cut off after
    the mean, so that this is no bound of what its tokens get. The query's own block is always among the best; `sinks`
    and `local` count such blocks, too. Of their tokens those are read that the indexer rates best, as many as the
    budget says.

    What is remembered of a block is that mean, fp32 ``[B, 1, blocks, W]``, of the newest one that of the tokens it has.
    Single queries rate the tokens of their blocks alone. In a prompt all tokens are rated and those of other blocks
    left out: tokens listed for each query would have to be gathered, which takes more memory than the ratings.

    Attributes:
        sinks: First blocks of a sample whose tokens are always rated.
        block: Tokens of a block.
        blocks: Blocks whose tokens are rated.
    """

    kind: ClassVar[str] = "blocks_then_tokens"
    wants_score: ClassVar[bool] = False
    goes_on: ClassVar[bool] = True
    fills: ClassVar[bool] = True

    sinks: int = Field(default=1, ge=0)
    block: int = Field(default=128, ge=2)
    blocks: int = Field(default=64, ge=1)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseSelector`."""
        super().check(block_q, block_k)
        if not self.own:
            raise ValueError("`own: true`: the tokens of a query's own block are rated always")

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseSelector`."""
        del kv_heads, width, dtype, block
        return (PageState(_MEAN, 1, self._width, self.block, torch.float32),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseSelector`."""
        del layer
        asked = pages.asked
        assert asked is not None
        place = b.call(aten.sub.Tensor, pages.slot, asked.past)  # [R, block]
        fresh = b.compare("ge", place, 0)
        keys = b.call(aten.index.Tensor, pages.index, [None, None, b.where(fresh, place, 0)])  # [B, 1, R, block, W]
        new = b.logical_and(pages.real, fresh)  # [B, R, block]
        counted, there = (b.sum(b.cast(x, torch.float32), 2) for x in (new, pages.real))  # [B, R]
        wide = b.unsqueeze(b.unsqueeze(b.cast(new, torch.float32), 1), 4)
        added = b.sum(b.mul(b.cast(keys, torch.float32), wide), 3)  # [B, 1, R, W]
        earlier = b.unsqueeze(b.unsqueeze(b.sub(there, counted), 1), 3)
        held = b.where(b.compare("gt", earlier, 0), b.mul(pages.held[_MEAN], earlier), 0.0)
        many = b.unsqueeze(b.unsqueeze(b.clamp_min(there, 1.0), 1), 3)
        return {_MEAN: b.div(b.add(held, added), many)}

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        del score
        b = cut.b
        assert cut.indexed is not None
        large = replace(cut, block_k=self.block)
        rating = large.of_blocks(cut.indexed.rated(b, cut.states[_MEAN]))  # [B, 1, MQ, blocks]
        rating = self.rated(large, rating)
        most = b.min_sizes(self.blocks, large.blocks)
        tokens = budget.kept(b, cut.total, cut.total)
        if cut.single:
            return self._of_blocks(cut, *ranked(large, rating, most), tokens)
        best = best_of(large, rating, most)
        home = b.call(aten.floor_divide.default, cut.slots, self.block)
        inside = b.logical_and(b.call(aten.index_select.default, best, 3, home), cut.visible)
        whole = cut.indexed.rated(b, prefix(b, cut.states[INDEX], 2, cut.total))
        return first_of(cut, *ranked(cut, b.where(inside, whole, HIDDEN), tokens), None)

    def _of_blocks(self, cut: SparseCut, values: Any, places: Any, tokens: Any) -> BlockList:
        """Return the best tokens of some blocks, ``[B, 1, 1, m]`` each."""
        b = cut.b
        assert cut.indexed is not None
        batch = b.size(cut.query, 0)
        inside = b.unsqueeze(b.mul(places, self.block), 4)
        slots = b.call(aten.flatten.using_ints, b.add(inside, b.arange(self.block, places)), 3, 4)  # [B, 1, 1, N]
        taken = b.unsqueeze(b.compare("gt", values, HIDDEN / 2), 4)
        taken = b.expand(taken, [batch, 1, 1, b.size(places, 3), self.block])
        there = b.call(aten.lt.Scalar, slots, cut.total)
        slots = b.where(there, slots, 0)
        flat = b.squeeze(slots, 2)  # [B, 1, N]
        keys = b.call(ops.gather_slots.default, cut.states[INDEX], flat)
        real = b.gather(cut.real, 1, b.squeeze(flat, 1))
        meant = b.logical_and(b.call(aten.flatten.using_ints, taken, 3, 4), there)
        meant = b.logical_and(meant, b.unsqueeze(b.unsqueeze(real, 1), 1))
        rated = b.where(meant, cut.indexed.rated(b, keys), HIDDEN)
        best, order = ranked(cut, rated, b.min_sizes(tokens, b.size(slots, 3)))
        return first_of(cut, best, b.gather(slots, 3, order), None)
