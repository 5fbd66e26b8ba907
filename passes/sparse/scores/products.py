"""Tokens by the products of queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["Products"]


class Products(SparseScore):
    """The logits themselves, of which the softmax keeps the order (TidalDecode, arXiv:2410.05076)."""

    kind: ClassVar[str] = "products"

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        if (block_q, block_k) != (1, 1):
            raise ValueError(f"single queries and keys, not blocks of {block_q} and {block_k}")

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        return cut.products(cut.query, cut.key)
