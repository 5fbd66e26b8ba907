"""Parts of equal size that blocks of queries and keys are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tokcc.passes.sparse.cut import SparseCut

__all__ = ["Tiles"]

aten = torch.ops.aten


@dataclass
class Tiles:
    """A call in ``T`` tiles of queries and ``N`` of keys, the same number in every block.

    Attributes:
        cut: The call.
        size: Tokens of a tile; divides both block sizes.
    """

    cut: SparseCut
    size: int

    @staticmethod
    def check(size: int, block_q: int, block_k: int) -> None:
        """Refuse a size that does not divide the blocks.

        Raises:
            ValueError: Says what is needed.
        """
        if block_q % size or block_k % size:
            raise ValueError(f"a number that divides blocks of {block_q} queries and {block_k} keys, not {size}")

    @property
    def _per_row(self) -> int:
        return self.cut.block_q // self.size

    @property
    def _per_block(self) -> int:
        return self.cut.block_k // self.size

    @property
    def rows(self) -> Any:
        """T."""
        return self.cut.b.mul_sizes(self.cut.rows, self._per_row)

    @property
    def blocks(self) -> Any:
        """N."""
        return self.cut.b.mul_sizes(self.cut.blocks, self._per_block)

    @cached_property
    def query(self) -> Any:
        """``[B, H, T, size, D]``; zeros behind the last query and for padding."""
        return self._cut(self.cut.query_blocks, self.rows)

    @cached_property
    def key(self) -> Any:
        """``[B, Hkv, N, size, D]``; zeros behind the last key and for padding."""
        return self._cut(self.cut.key_blocks, self.blocks)

    @cached_property
    def query_counts(self) -> Any:
        """Real queries, fp32 ``[B, T]``."""
        return self._counted(self.cut.by_query(self._float(self.cut.real_rows), 1), self.rows)

    @cached_property
    def counts(self) -> Any:
        """Real keys, fp32 ``[B, N]``."""
        return self._counted(self.cut.by_key(self._float(self.cut.real), 1), self.blocks)

    @cached_property
    def seen(self) -> Any:
        """Bool ``[B, 1, T, N]``: tiles with a key that begin no later than the tile of queries ends."""
        b, cut = self.cut.b, self.cut
        own = b.reshape(cut.by_query(cut.own_slots, 0), [self.rows, self.size])
        last = b.amax(own, 1)  # zeros stand behind the last query
        places = b.reshape(cut.by_key(cut.slots, 0), [self.blocks, self.size])
        first = b.call(aten.select.int, places, 1, 0)
        reached = b.compare("le", b.unsqueeze(first, 0), b.unsqueeze(last, 1))  # [T, N]
        filled = b.compare("gt", self.counts, 0)
        return b.logical_and(reached, b.unsqueeze(b.unsqueeze(filled, 1), 1))

    @cached_property
    def asked(self) -> Any:
        """Bool ``[B, 1, T, 1]``: tiles with a query."""
        b = self.cut.b
        return b.unsqueeze(b.unsqueeze(b.compare("gt", self.query_counts, 0), 1), 3)

    def in_blocks(self, table: Any) -> Any:
        """Return ``[B, H, T, N]`` by block, ``[B, H, MQ, T / MQ, M, N / M]``."""
        b, cut = self.cut.b, self.cut
        sizes = [b.size(table, 0), int(b.shape(table)[1])]
        return b.reshape(table, [*sizes, cut.rows, self._per_row, cut.blocks, self._per_block])

    def _cut(self, blocks: Any, count: Any) -> Any:
        b = self.cut.b
        shape = b.shape(blocks)
        return b.reshape(blocks, [b.size(blocks, 0), int(shape[1]), count, self.size, int(shape[4])])

    def _counted(self, blocks: Any, count: Any) -> Any:
        b = self.cut.b
        return b.sum(b.reshape(blocks, [b.size(blocks, 0), count, self.size]), 2)

    def _float(self, x: Any) -> Any:
        return self.cut.b.cast(x, torch.float32)
