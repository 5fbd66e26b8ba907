"""Blocks of a text that a token closes, and by which they are weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.budget import Count
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.runs import prefix, run_from
from tokcc.passes.capping import capped
from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import best_of, ranked

__all__ = ["ClosedBlocks"]

aten = torch.ops.aten
ops = torch.ops.tokcc
_MARKS = "key_marks"
_NOWHERE = 2**40


@dataclass(frozen=True)
class _Layout:
    """Where the blocks of a text lie: M closed ones at most, and an open one behind the last of them.

    Attributes:
        starts: Slot of the first token of each block, int64 ``[B, M + 1]``; beyond the last slot where there is none.
        ends: Slot of the token that closes it, likewise; beyond the last slot where none does.
        own: Number of the block that each query lies in, int64 ``[B, S]``.
        many: M.
        closed: How many blocks are closed, int64 ``[B, 1]``.
    """

    starts: Any
    ends: Any
    own: Any
    many: Any
    closed: Any


class ClosedBlocks(SparseSelector):
    """Landmark Attention (arXiv:2305.16300, 3.1): a softmax in groups, and the blocks whose closing token wins.

    A token of the vocabulary closes a block of the text. What a query gives to an earlier block is what it gives to
    the token that closes it, in one softmax with the tokens of its own block; within the block it is shared out by a
    softmax over the block's tokens. Closing tokens have no part of it themselves, and a query that is one does not see
    itself. The budget is how many earlier blocks a query reads at most, by the product with their closing token, each
    query head its own: the others are left out of both.

    In logits that is one softmax over the tokens that are read, where those of an earlier block have the closing
    token's logit less the logarithm of the sum of the block's exponentials added.

    A block has at most as many tokens as the step's blocks of keys, the closing one among them. All are of that size,
    but for the first, which may be smaller; tokens that are further from the block's beginning are not seen. A prompt's
    queries read everything and leave out most of it; a single one gathers its blocks.

    Attributes:
        token: The id of the token that closes blocks.
    """

    kind: ClassVar[str] = "closed_blocks"
    wants_score: ClassVar[bool] = False
    wants_ids: ClassVar[bool] = True
    attends: ClassVar[bool] = True
    fills: ClassVar[bool] = True

    token: int = Field(ge=0)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseSelector`."""
        if block_q != 1 or block_k < 2:
            raise ValueError(f"single queries, and blocks of a closing token and others; not {block_q} and {block_k}")
        if self.sinks or self.local or not self.own:
            raise ValueError("`sinks`, `local` and `own` as they are: a query reads its own block, and the best before")

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseSelector`."""
        del kv_heads, width, block
        return (PageState(_MARKS, 1, 1, 1, dtype),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseSelector`."""
        del layer
        marks = b.cast(b.compare("eq", pages.ids, self.token), b.dtype(pages.key))
        return {_MARKS: b.unsqueeze(b.unsqueeze(marks, 1), 3)}

    def attended(self, cut: SparseCut, score: Any, budget: Count) -> Any:
        """See :class:`SparseSelector`."""
        del score
        layout = self._layout(cut)
        return self._gathered(cut, layout, budget) if cut.single else self._whole(cut, layout, budget)

    def _layout(self, cut: SparseCut) -> _Layout:
        b = cut.b
        held = b.squeeze(b.squeeze(prefix(b, cut.states[_MARKS], 2, cut.total), 3), 1)  # [B, L]
        marks = b.logical_and(b.compare("gt", held, 0.5), cut.real)
        slots = b.where(marks, cut.slots, _NOWHERE)
        many = b.floordiv_sizes(b.add_sizes(cut.total, cut.block_k - 1), cut.block_k)
        many = b.min_sizes(many, cut.total)
        ends = b.parts(b.call(aten.topk.default, slots, many, -1, False, True), 2)[0]  # [B, M]
        first = b.amin(b.where(cut.real, cut.slots, _NOWHERE), 1, keepdim=True)
        starts = b.cat([first, b.add(ends, 1)], 1)
        ends = b.cat([ends, b.add(b.mul(first, 0), _NOWHERE)], 1)
        ones = b.cast(marks, torch.int64)
        before = b.sub(b.call(aten.cumsum.default, ones, 1), ones)
        own = run_from(b, before, 1, cut.past, cut.new)
        return _Layout(starts, ends, own, many, b.sum(ones, 1, keepdim=True))

    @staticmethod
    def _most(cut: SparseCut, layout: _Layout, budget: Count) -> tuple[Any, Any]:
        """Return how many closed blocks are read in the batch, and in each sample; None = as many."""
        b = cut.b
        most = budget.kept(b, layout.many, layout.many)
        if budget.kind != "share" or budget.nothing:
            return most, None
        own = budget.kept_per_sample(b, layout.closed, layout.closed)
        return most, b.unsqueeze(b.unsqueeze(own, 2), 3)

    def _whole(self, cut: SparseCut, layout: _Layout, budget: Count) -> Any:
        """Attend with all blocks, of which those that are not read weigh nothing."""
        b, block = cut.b, cut.block_k
        many = b.add_sizes(layout.many, 1)
        batch = b.size(cut.query, 0)
        slots, tokens = self._inside(cut, layout.starts, layout.ends)  # [B, M + 1, block]
        flat = b.reshape(b.call(aten.clamp_max.default, slots, b.sub_sizes(cut.total, 1)), [batch, -1])
        closing = b.call(aten.clamp_max.default, layout.ends, b.sub_sizes(cut.total, 1))
        key, value, closers = (
            self._taken(cut, x, index) for x, index in ((cut.key, flat), (cut.value, flat), (cut.key, closing))
        )
        sizes = [batch, cut.heads, cut.new]
        logits = b.reshape(self._logits(cut, cut.query, key), [*sizes, many, block])
        of_block = self._logits(cut, cut.query, closers)  # [B, H, S, M + 1]
        number = b.arange(many, cut.key)
        own = b.unsqueeze(layout.own, 2)  # [B, S, 1]
        earlier = b.unsqueeze(b.compare("lt", number, own), 1)  # [B, 1, S, M + 1]
        rating = cut.shared(b.where(earlier, of_block, HIDDEN), self.share)
        read = cut.for_heads(best_of(cut, rating, *self._most(cut, layout, budget)))
        tokens = b.unsqueeze(b.unsqueeze(tokens, 1), 1)  # [B, 1, 1, M + 1, block]
        seen = b.compare("le", b.unsqueeze(slots, 1), b.reshape(cut.own_slots, [1, -1, 1, 1]))
        mine = b.logical_and(b.unsqueeze(b.compare("eq", number, own), 3), seen)  # [B, S, M + 1, block]
        mine = b.logical_and(b.unsqueeze(mine, 1), tokens)
        theirs = b.logical_and(b.unsqueeze(read, 4), tokens)
        probs = self._grouped(b, logits, of_block, mine, theirs)
        grouped = cut.grouped(b.cast(probs, b.dtype(value)))  # [B, Hkv, G, S, N]
        return b.call(aten.flatten.using_ints, b.matmul(grouped, b.unsqueeze(value, 2)), 1, 2)

    def _gathered(self, cut: SparseCut, layout: _Layout, budget: Count) -> Any:
        """Attend with the blocks that a single query reads and its own."""
        b, block = cut.b, cut.block_k
        batch = b.size(cut.query, 0)
        held = cut.buffers or (cut.key, cut.value)
        last = b.sub_sizes(cut.total, 1)
        closing = b.call(aten.clamp_max.default, layout.ends, last)
        of_block = self._logits(cut, cut.query, self._taken(cut, held[0], closing))  # [B, H, 1, M + 1]
        earlier = b.compare("lt", b.arange(b.add_sizes(layout.many, 1), cut.key), layout.own)  # [B, M + 1]
        rating = b.where(b.unsqueeze(b.unsqueeze(earlier, 1), 1), of_block, HIDDEN)
        most, wanted = self._most(cut, layout, budget)
        values, places = ranked(cut, cut.shared(rating, self.share), most)  # [B, Hs, 1, K]
        taken = b.compare("gt", values, HIDDEN / 2)
        if wanted is not None:
            taken = b.logical_and(taken, b.compare("lt", b.arange(b.size(places, 3), places), wanted))
        taken, places = cut.for_heads(taken), cut.for_heads(places)
        of_block = b.gather(of_block, 3, places)
        own = b.expand(b.reshape(layout.own, [batch, 1, 1, 1]), [batch, cut.heads, 1, 1])
        # The query's own block stands last.
        places, here = b.cat([places, own], 3), b.compare("ge", own, 0)
        last_one = b.cat([b.logical_and(taken, b.logical_not(taken)), here], 3)
        taken = b.cat([taken, b.logical_not(here)], 3)
        of_block = b.cat([of_block, b.cast(b.mul(own, 0), torch.float32)], 3)
        many = b.size(places, 3)
        index = b.reshape(places, [batch, -1])  # [B, H * (K + 1)]
        starts, ends = (b.gather(x, 1, index) for x in (layout.starts, layout.ends))
        slots, tokens = self._inside(cut, starts, ends)
        slots = b.call(aten.clamp_max.default, slots, last)
        sizes = [batch, cut.heads, 1, many, block]
        tokens = b.reshape(tokens, sizes)
        group = cut.heads // cut.kv_heads
        by_group = b.reshape(slots, [batch, cut.kv_heads, b.mul_sizes(many, group * block)])
        key, value = (
            b.reshape(
                b.call(ops.gather_slots.default, x, by_group),
                [batch, cut.heads, b.mul_sizes(many, block), int(b.shape(x)[3])],
            )
            for x in held
        )
        logits = b.matmul(cut.query, b.transpose(key, 2, 3))
        logits = b.reshape(self._scaled(cut, logits), sizes)
        mine = b.logical_and(b.unsqueeze(last_one, 4), tokens)
        theirs = b.logical_and(b.unsqueeze(taken, 4), tokens)
        probs = self._grouped(b, logits, of_block, mine, theirs)
        return b.matmul(b.cast(probs, b.dtype(value)), value)

    @staticmethod
    def _inside(cut: SparseCut, starts: Any, ends: Any) -> tuple[Any, Any]:
        """Return the slots of blocks ``[B, N]`` as ``[B, N, block]``, and which of them are tokens that may weigh."""
        b = cut.b
        slots = b.add(b.unsqueeze(starts, 2), b.arange(cut.block_k, cut.key))
        last = b.call(aten.clamp_max.default, b.unsqueeze(ends, 2), cut.total)
        return slots, b.compare("lt", slots, last)

    @staticmethod
    def _taken(cut: SparseCut, x: Any, index: Any) -> Any:
        """Return slots ``[B, N]`` of ``[B, Hkv, L, D]`` in all heads."""
        b = cut.b
        wide = b.expand(b.unsqueeze(index, 1), [b.size(x, 0), cut.kv_heads, b.size(index, 1)])
        return b.call(ops.gather_slots.default, x, wide)

    def _logits(self, cut: SparseCut, query: Any, key: Any) -> Any:
        """Return fp32 ``[B, H, S, N]`` of keys ``[B, Hkv, N, D]``."""
        return self._scaled(cut, cut.products(query, key))

    @staticmethod
    def _scaled(cut: SparseCut, products: Any) -> Any:
        b = cut.b
        return capped(b, b.mul(b.cast(products, torch.float32), cut.scale), cut.softcap)

    @staticmethod
    def _grouped(b: Builder, logits: Any, of_block: Any, mine: Any, theirs: Any) -> Any:
        """Return the weights of the tokens of all blocks, ``[B, H, S, N * block]``.

        Args:
            b: The builder.
            logits: fp32 ``[B, H, S, N, block]``.
            of_block: Of the tokens that close the blocks, ``[B, H, S, N]``.
            mine: bool: tokens of the query's own block that it sees.
            theirs: bool: tokens of earlier blocks that are read.
        """
        inside = b.where(theirs, logits, HIDDEN)
        peak = b.amax(inside, 4, keepdim=True)
        mass = b.sum(b.exp(b.sub(inside, peak)), 4, keepdim=True)
        shift = b.sub(b.unsqueeze(of_block, 4), b.add(peak, b.log(mass)))
        whole = b.where(mine, logits, b.where(theirs, b.add(logits, shift), HIDDEN))
        return b.softmax(b.call(aten.flatten.using_ints, whole, 3, 4), 3)
