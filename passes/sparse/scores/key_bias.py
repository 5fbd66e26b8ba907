"""Tokens by what the model itself adds to the logits of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["KeyBiasScore"]

_BIAS = "key_bias"


class KeyBiasScore(SparseScore):
    """Dynamic Mask Attention (arXiv:2508.02124): the bias of each key, which is the same for all queries.

    The model makes it from the values of all heads, one number for each key and key head, and adds it to the logits.
    The rating is by key head: query heads that share keys share a list.

    Attributes:
        remember: Keep the number of each key beside its value, ``[B, Hkv, tokens, 1]``; without, every call makes those
            of the whole cache anew.
    """

    kind: ClassVar[str] = "key_bias"
    wants_bias: ClassVar[bool] = True

    remember: bool = True

    @property
    def bias_state(self) -> str | None:
        """See :class:`SparseScore`."""
        return _BIAS if self.remember else None

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        del block_q
        if block_k != 1:
            raise ValueError(f"single keys, not blocks of {block_k}")

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        del width
        return (PageState(_BIAS, kv_heads, 1, block, dtype),) if self.remember else ()

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        del layer
        return {_BIAS: b.unsqueeze(pages.bias, 3)}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        return cut.b.unsqueeze(cut.b.cast(cut.bias, torch.float32), 2)  # [B, Hkv, 1, L]
