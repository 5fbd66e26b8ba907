"""Blocks by one product with a blend of their largest and smallest keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.pooling import pooled
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["PageBlend"]

_BLEND = "key_blend"


class PageBlend(SparseScore):
    """MPCache (arXiv:2501.06807): ``sum over c of q_c * (a * max_c + (1 - a) * min_c)`` over the keys of a block.

    In place of the bound of :class:`~tokcc.passes.sparse.scores.page_bounds.PageBounds`, whose choice for every channel
    is gone: half as much to remember, ``[B, Hkv, blocks, D]``, and no bound any more.

    Attributes:
        blend: The ``a``: how much of it is the largest.
    """

    kind: ClassVar[str] = "page_blend"
    for_single: ClassVar[bool] = True

    blend: float = Field(default=0.6, ge=0, le=1)

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        return (PageState(_BLEND, kv_heads, width, block, dtype),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        del layer
        high, low = (pooled(b, pages.key, pages.real, pool) for pool in ("max", "min"))
        return {_BLEND: b.add(b.mul(high, self.blend), b.mul(low, 1.0 - self.blend))}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        return cut.of_blocks(cut.products(cut.query, cut.states[_BLEND]))
