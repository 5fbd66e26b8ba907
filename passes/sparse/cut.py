"""What sparse pieces work with: the queries and keys of one layer in one call, in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import prefix, run_from
from tokcc.passes.cache.visible import places_in_text, slot_rank
from tokcc.passes.sparse.turning import Turn, turned_back

__all__ = ["FORCED", "HIDDEN", "BlockList", "Indexed", "Share", "SparseCut"]

aten = torch.ops.aten
ops = torch.ops.tokcc

HIDDEN = -1e30
"""Rating of a block that no query of the row may see."""
FORCED = 1e24
"""Rating of a block that is always read."""

Share = Literal["each", "group_max", "group_mean", "all_mean"]
"""Who has a list of its own: every query head, every key head, or the layer."""


@dataclass(frozen=True)
class BlockList:
    """The key blocks that each row of queries reads.

    Attributes:
        index: int64 ``[B, Hs, MQ, K]``, ascending up to the count where there are several rows of queries; behind it
            blocks that exist.
        count: int64 ``[B, Hs, MQ]``, at least 1.
    """

    index: Any
    count: Any


@dataclass(frozen=True)
class Indexed:
    """What the model's own indexer compares the tokens of a call by.

    Attributes:
        query: ``[B, heads, S, W]``.
        gate: ``[B, heads, S, 1]``.
        scale: Factor of the products.
    """

    query: Any
    gate: Any
    scale: float

    def rated(self, b: Builder, keys: Any) -> Any:
        """Return what the indexer rates ``[B, 1, N, W]``: fp32 ``[B, 1, S, N]``."""
        wide = b.transpose(b.cast(keys, torch.float32), 2, 3)
        products = b.clamp_min(b.mul(b.matmul(b.cast(self.query, torch.float32), wide), self.scale), 0.0)
        return b.sum(b.mul(products, b.cast(self.gate, torch.float32)), 1, keepdim=True)


@dataclass
class SparseCut:
    """The attention of one layer in one call, before anything is computed.

    ``P`` slots are in the cache, the call brings ``S`` tokens, ``L = P + S``. Queries are cut into ``MQ`` blocks from
    the first of the call on, keys into ``M`` blocks from the first slot on.

    Attributes:
        b: The builder.
        layer: 0-based layer.
        num_layers: Depth of the model.
        query: ``[B, H, S, D]``, rotated where the model rotates.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        real: bool ``[B, L]``: slots that are not padding.
        past: P.
        new: S.
        total: L.
        scale: Factor of the logits.
        softcap: Cap of the logits, 0 = none.
        block_q: Queries in a block.
        block_k: Keys in a block.
        buffers: Where keys and values are held, ``[B, Hkv, N, D]`` with N at least L; None = as above.
        states: What the score remembers of blocks, by name: ``[B, heads, rows, width]`` with at least as many rows as
            there are blocks.
        before: What was remembered of the whole text before the call, by name: ``[B, heads, 1, width]``; any numbers
            in the first one.
        larger: For selectors that want ratings of larger blocks, the same call in those and their ratings, by how many
            of its blocks are in one.
        lists: What was chosen in the layers in front, by layer.
        single: Only the last token of the call asks.
        unturned: The queries before their positions turn them; None where no piece wants them.
        turns: What turns queries and keys ``[B, heads, N, D]`` to positions int64 ``[B, N]``; None likewise.
        bias: What the model itself adds to the logits of keys, ``[B, Hkv, L]``; None = nothing.
        indexed: What the model's own indexer compares the tokens by; None = there is no indexer.
    """

    b: Builder
    layer: int
    num_layers: int
    query: Any
    key: Any
    value: Any
    real: Any
    past: Any
    new: Any
    total: Any
    scale: float
    softcap: float
    block_q: int
    block_k: int
    buffers: tuple[Any, Any] | None = None
    states: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    larger: Mapping[int, tuple[SparseCut, Any]] = field(default_factory=dict)
    lists: dict[int, BlockList] = field(default_factory=dict)
    single: bool = False
    unturned: Any = None
    turns: tuple[Turn, Turn] | None = None
    bias: Any = None
    indexed: Indexed | None = None

    def of_last(self) -> SparseCut:
        """Return what the last token of the call asks: shapes are those of a call with one token."""
        b = self.b

        def last(x: Any) -> Any:
            return None if x is None else b.unsqueeze(b.call(aten.select.int, x, 2, -1), 2)

        past = b.sub_sizes(self.total, 1)
        indexed = self.indexed
        if indexed is not None:
            indexed = replace(indexed, query=last(indexed.query), gate=last(indexed.gate))
        return replace(
            self, query=last(self.query), unturned=last(self.unturned), past=past, new=1, single=True, indexed=indexed
        )

    def of_blocks(self, table: Any) -> Any:
        """Return ``[..., rows]``, which may have rows for blocks that do not exist yet, as ``[..., M]``."""
        return prefix(self.b, table, len(self.b.shape(table)) - 1, self.blocks)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.b.shape(self.query)[1])

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return int(self.b.shape(self.key)[1])

    def of_heads(self, heads: Sequence[int]) -> SparseCut:
        """Return the attention of some query heads, each with a key head of its own."""
        group = self.heads // self.kv_heads
        asked, read = (torch.tensor(list(numbers)) for numbers in (heads, [head // group for head in heads]))

        def pick(x: Any, numbers: torch.Tensor) -> Any:
            return self.b.call(aten.index_select.default, x, 1, self.b.constant("sparse_heads", numbers))

        bias = None if self.bias is None else pick(self.bias, read)
        return replace(
            self, query=pick(self.query, asked), key=pick(self.key, read), value=pick(self.value, read), bias=bias
        )

    @cached_property
    def slots(self) -> Any:
        """int64 ``[L]``."""
        return self.b.arange(self.total, self.key)

    @cached_property
    def own_slots(self) -> Any:
        """The slots of the call's queries, int64 ``[S]``."""
        return run_from(self.b, self.slots, 0, self.past, self.new)

    @cached_property
    def real_rows(self) -> Any:
        """Bool ``[B, S]``: queries that are not padding."""
        return run_from(self.b, self.real, 1, self.past, self.new)

    def by_query(self, x: Any, axis: int) -> Any:
        """Cut an axis of S into ``MQ, block_q``."""
        return self.b.call(ops.split_blocks.default, x, axis, self.block_q)

    def by_key(self, x: Any, axis: int) -> Any:
        """Cut an axis of L into ``M, block_k``."""
        return self.b.call(ops.split_blocks.default, x, axis, self.block_k)

    @cached_property
    def query_blocks(self) -> Any:
        """``[B, H, MQ, block_q, D]``; zeros behind the last query and for padding."""
        return self.in_rows(self.query)

    @cached_property
    def key_blocks(self) -> Any:
        """``[B, Hkv, M, block_k, D]``; zeros behind the last key and for padding."""
        return self.in_blocks(self.key)

    def in_rows(self, x: Any) -> Any:
        """Return ``[B, H, S, D]`` as ``[B, H, MQ, block_q, D]``; zeros behind the last query and for padding."""
        b = self.b
        real = b.unsqueeze(b.unsqueeze(b.cast(self.real_rows, b.dtype(x)), 1), 3)
        return self.by_query(b.mul(x, real), 2)

    def in_blocks(self, x: Any) -> Any:
        """Return ``[B, Hkv, L, D]`` as ``[B, Hkv, M, block_k, D]``; zeros behind the last key and for padding."""
        b = self.b
        real = b.unsqueeze(b.unsqueeze(b.cast(self.real, b.dtype(x)), 1), 3)
        return self.by_key(b.mul(x, real), 2)

    @cached_property
    def places(self) -> Any:
        """The place of every slot among the real ones of its sample, int64 ``[B, L]``; 0 for padding in front."""
        return places_in_text(self.b, self.real)

    @cached_property
    def unturned_key(self) -> Any:
        """The keys before their positions turned them, ``[B, Hkv, L, D]``."""
        assert self.turns is not None
        return turned_back(self.b, self.turns[1], self.key, self.places)

    @cached_property
    def query_means(self) -> Any:
        """The mean query of every row, ``[B, H, MQ, D]``."""
        return self._means(self.query_blocks, self.query_counts)

    @cached_property
    def key_means(self) -> Any:
        """The mean key of every block, ``[B, Hkv, M, D]``."""
        return self._means(self.key_blocks, self.counts)

    def _means(self, blocks: Any, counts: Any) -> Any:
        b = self.b
        many = b.cast(b.clamp_min(counts, 1.0), b.dtype(blocks))
        return b.div(b.sum(blocks, 3), b.unsqueeze(b.unsqueeze(many, 1), 3))

    @property
    def rows(self) -> Any:
        """MQ."""
        return self.b.size(self.first_slots, 0)

    @property
    def blocks(self) -> Any:
        """M."""
        return self.b.size(self._block_places, 0)

    @cached_property
    def first_slots(self) -> Any:
        """The slot of the first query of every row, int64 ``[MQ]``."""
        return self.b.call(aten.select.int, self.by_query(self.own_slots, 0), 1, 0)

    @cached_property
    def last_slots(self) -> Any:
        """The slot of the last query of every row, int64 ``[MQ]``."""
        return self.b.amax(self.by_query(self.own_slots, 0), 1)

    @cached_property
    def _block_places(self) -> Any:
        """The first slot of every key block, int64 ``[M]``."""
        return self.b.call(aten.select.int, self.by_key(self.slots, 0), 1, 0)

    @cached_property
    def block_starts(self) -> Any:
        """The same beside the rows: int64 ``[1, M]``."""
        return self.b.unsqueeze(self._block_places, 0)

    @cached_property
    def counts(self) -> Any:
        """Real keys of every block, fp32 ``[B, M]``."""
        return self.b.sum(self.by_key(self.b.cast(self.real, torch.float32), 1), 2)

    @cached_property
    def seen(self) -> Any:
        """Real tokens in front of the call, fp32 ``[B, 1]``."""
        b = self.b
        everyone, own = (b.sum(b.cast(x, torch.float32), 1, keepdim=True) for x in (self.real, self.real_rows))
        return b.sub(everyone, own)

    @cached_property
    def query_counts(self) -> Any:
        """Real queries of every row, fp32 ``[B, MQ]``."""
        return self.b.sum(self.by_query(self.b.cast(self.real_rows, torch.float32), 1), 2)

    @cached_property
    def reached(self) -> Any:
        """Bool ``[MQ, M]``: blocks that begin no later than the row ends."""
        return self.b.compare("le", self.block_starts, self.b.unsqueeze(self.last_slots, 1))

    @cached_property
    def visible(self) -> Any:
        """Bool ``[B, 1, MQ, M]``: blocks of which some query of the row sees some key; its own among them."""
        b = self.b
        filled = b.unsqueeze(b.unsqueeze(b.compare("gt", self.counts, 0), 1), 1)  # [B, 1, 1, M]
        return b.logical_or(b.logical_and(self.reached, filled), self.own)

    @cached_property
    def own(self) -> Any:
        """Bool ``[MQ, M]``: blocks in which keys of the row's own tokens lie."""
        return self.nearest(0)

    @cached_property
    def rank(self) -> Any:
        """The place of every block among those of its sample that hold anything, int64 ``[B, M]``; below 0 = none."""
        return slot_rank(self.b, self.b.compare("gt", self.counts, 0))

    def sinks(self, count: int) -> Any:
        """Return bool ``[B, 1, 1, M]``: the first blocks of each sample, padding not counted."""
        b = self.b
        first = b.logical_and(b.compare("lt", self.rank, count), b.compare("ge", self.rank, 0))
        return b.unsqueeze(b.unsqueeze(first, 1), 1)

    def nearest(self, count: int) -> Any:
        """Return bool ``[MQ, M]``: the row's own blocks and so many in front of them."""
        b = self.b
        start = b.sub(b.unsqueeze(self.first_slots, 1), count * self.block_k)
        return b.logical_and(self.reached, b.compare("gt", b.add(self.block_starts, self.block_k), start))

    def edges(self, sinks: int, local: int) -> Any:
        """Return bool ``[B or 1, 1, MQ, M]``: the first blocks of a sample, those in front of a row, and its own."""
        b = self.b
        own = self.nearest(local)
        if not sinks:
            return b.unsqueeze(b.unsqueeze(own, 0), 0)
        return b.logical_or(own, b.logical_and(self.sinks(sinks), self.visible))

    def grouped(self, x: Any) -> Any:
        """Return ``[B, H, ...]`` as ``[B, Hkv, G, ...]``."""
        shape = self.b.shape(x)
        sizes = [self.b.size(x, axis) for axis in range(2, len(shape))]
        return self.b.reshape(x, [self.b.size(x, 0), self.kv_heads, self.heads // self.kv_heads, *sizes])

    def products(self, query: Any, key: Any) -> Any:
        """Return the products ``[B, H, R, N]`` in fp32 of ``[B, H, R, W]`` and ``[B, Hkv, N, W]``."""
        b = self.b
        rows, width = b.shape(query)[2:]
        if isinstance(rows, int) and rows == 1:
            # The queries of a group side by side: keys are read once.
            side = b.reshape(query, [b.size(query, 0), self.kv_heads, self.heads // self.kv_heads, int(width)])
            made = b.matmul(side, b.transpose(key, 2, 3))  # [B, Hkv, G, N]
            return b.unsqueeze(b.cast(b.call(aten.flatten.using_ints, made, 1, 2), torch.float32), 2)
        grouped = self.grouped(query)  # [B, Hkv, G, R, W]
        made = b.matmul(grouped, b.unsqueeze(b.transpose(key, 2, 3), 2))  # [B, Hkv, G, R, N]
        return b.cast(b.call(aten.flatten.using_ints, made, 1, 2), torch.float32)

    def shared(self, table: Any, share: Share) -> Any:
        """Return a table ``[B, H, ...]`` for those who share a list: ``[B, Hs, ...]``.

        One by key head ``[B, Hkv, ...]`` is what the heads of a group share already.
        """
        b = self.b
        if share == "each" or int(b.shape(table)[1]) == 1:
            return table
        if share == "all_mean":
            return b.mean(table, 1, True)
        if int(b.shape(table)[1]) == self.kv_heads:
            return table
        return b.amax(self.grouped(table), 2) if share == "group_max" else b.mean(self.grouped(table), 2)

    def for_heads(self, table: Any) -> Any:
        """Return ``[B, Hs, ...]`` for every query head, ``[B, H, ...]``."""
        b = self.b
        shape, lists = b.shape(table), int(b.shape(table)[1])
        if lists == self.heads:
            return table
        sizes = [b.size(table, axis) for axis in range(2, len(shape))]
        wide = b.expand(b.unsqueeze(table, 2), [b.size(table, 0), lists, self.heads // lists, *sizes])
        return b.call(aten.flatten.using_ints, wide, 1, 2)
