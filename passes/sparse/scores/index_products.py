"""Tokens by the model's own indexer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tokcc.capture.hf_decoder import INDEX
from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.runs import prefix
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.indexed import OfIndexer
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["IndexProducts"]


class IndexProducts(OfIndexer, SparseScore):
    """DeepSeek Sparse Attention: ``sum over heads j of g_j relu(q_j . k)`` of the model's own indexer.

    All heads of the layer share it. What is remembered is the indexer's key of each token, ``[B, 1, tokens, W]``, which
    the model caches itself.
    """

    kind: ClassVar[str] = "index_products"

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        del kv_heads, width
        return (PageState(INDEX, 1, self._width, block, dtype),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        del b, layer
        return {INDEX: pages.index}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        assert cut.indexed is not None
        return cut.indexed.rated(cut.b, prefix(cut.b, cut.states[INDEX], 2, cut.total))
