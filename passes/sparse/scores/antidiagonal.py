"""Blocks by sums over antidiagonals of the attention map."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.piece import SparseScore
from tokcc.passes.sparse.tiles import Tiles

__all__ = ["Antidiagonal"]

aten = torch.ops.aten


class Antidiagonal(SparseScore):
    """XAttention (arXiv:2503.16428): ``stride`` queries in reversed order against as many keys, as one long vector.

    The products are divided by ``sqrt(D) * stride`` and a softmax over the tiles that a tile of queries sees follows;
    a block's rating is the sum of its tiles. Queries that are not there, or are padding, count nothing.

    Attributes:
        stride: Tokens of a tile; divides both block sizes.
    """

    kind: ClassVar[str] = "antidiagonal"

    stride: int = Field(default=16, ge=1)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        Tiles.check(self.stride, block_q, block_k)

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        tiles = Tiles(cut, self.stride)
        turned = b.call(aten.flatten.using_ints, b.call(aten.flip.default, tiles.query, [3]), 3, 4)  # [B, H, T, s * D]
        keys = b.call(aten.flatten.using_ints, tiles.key, 3, 4)
        logits = b.mul(cut.products(turned, keys), cut.scale / self.stride)  # [B, H, T, N]
        probs = b.softmax(b.where(tiles.seen, logits, HIDDEN), 3)
        probs = tiles.in_blocks(b.mul(probs, b.cast(tiles.asked, torch.float32)))
        return b.sum(b.sum(probs, 5), 3)
