"""Blocks by the best pair of chunks inside them."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.piece import SparseScore
from tokcc.passes.sparse.tiles import Tiles

__all__ = ["Chunked"]


class Chunked(SparseScore):
    """Products of chunks of queries and chunks of keys, of which a block gets the largest (DHSA, arXiv:2510.24606).

    A chunk is the mean of its tokens times the root of their number, padding not counted. All tokens of a chunk have
    its rating, so a block that is read whole is as good as its best chunk.

    Attributes:
        chunk: Tokens of a chunk; divides both block sizes.
    """

    kind: ClassVar[str] = "chunked"

    chunk: int = Field(default=64, ge=1)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        Tiles.check(self.chunk, block_q, block_k)

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        tiles = Tiles(cut, self.chunk)
        query, key = (
            b.div(b.sum(x, 3), b.cast(b.unsqueeze(b.unsqueeze(b.sqrt(b.clamp_min(n, 1.0)), 1), 3), b.dtype(x)))
            for x, n in ((tiles.query, tiles.query_counts), (tiles.key, tiles.counts))
        )
        logits = b.mul(cut.products(query, key), cut.scale)  # [B, H, T, N]
        logits = b.where(b.logical_and(tiles.seen, tiles.asked), logits, HIDDEN)
        return b.amax(b.amax(tiles.in_blocks(logits), 5), 3)
