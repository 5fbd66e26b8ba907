"""Blocks by how large the product of the query with any of their keys could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.gating import pooled
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["PageBounds"]

_BOUNDS = "key_bounds"


class PageBounds(SparseScore):
    """Quest (arXiv:2406.10774, eq. 1): ``sum over c of max(q_c * max_c, q_c * min_c)`` over the keys of a block.

    What is remembered: the largest and the smallest number of every channel, ``[B, Hkv, blocks, 2 * D]``. Of the bound
    the positive channels of a query want the one and the negative ones the other: one product.
    """

    kind: ClassVar[str] = "page_bounds"
    for_single: ClassVar[bool] = True

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        return (PageState(_BOUNDS, kv_heads, 2 * width, block, dtype),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        del layer
        return {_BOUNDS: pooled(b, pages.key, pages.real, ("max", "min"))}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        positive = b.clamp_min(cut.query, 0.0)
        both = b.cat([positive, b.sub(cut.query, positive)], 3)  # [B, H, MQ, 2 * D]
        return cut.of_blocks(cut.products(both, cut.states[_BOUNDS]))
