"""Blocks by the product of the query with the mean of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.pooling import pooled
from tokcc.passes.sparse.clustering import halved
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["PageMeans"]

_MEAN = "key_mean"


class PageMeans(SparseScore):
    """``q`` times the mean key of a block, which is remembered: ``[B, Hkv, blocks, D]``.

    With ``halvings`` the tokens of a text enter the cache in an order of their own, for each key head, so that blocks
    have similar keys: sorted along the direction in which keys spread most, cut in two, each half sorted along the
    next, and so on.

    Attributes:
        halvings: Directions along which a text's keys are sorted; 0 = they stay in the order of the text.
        rounds: Multiplications by which a direction is found.
    """

    kind: ClassVar[str] = "page_means"
    for_single: ClassVar[bool] = True

    halvings: int = Field(default=0, ge=0, le=16)
    rounds: int = Field(default=8, ge=1)

    @property
    def orders(self) -> bool:
        """See :class:`SparseScore`."""
        return self.halvings > 0

    def order(self, b: Builder, key: Any, free: Any, block: int) -> Any:
        """See :class:`SparseScore`."""
        return halved(b, key, free, block, self.halvings, self.rounds)

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        return (PageState(_MEAN, kv_heads, width, block, dtype),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        del layer
        return {_MEAN: pooled(b, pages.key, pages.real, "mean")}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        return cut.of_blocks(cut.products(cut.query, cut.states[_MEAN]))
