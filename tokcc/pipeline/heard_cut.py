"""The attention that was heard in a decoder, as sparse pieces see it."""

from __future__ import annotations

import torch

from tokcc.analysis.head_numbers import Heard
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.sparse.cut import SparseCut

__all__ = ["cut_of"]


def cut_of(heard: Heard, block_q: int, block_k: int) -> SparseCut:
    """Return the call that was heard: one row, nothing in the cache and no padding.

    Args:
        heard: One layer's attention.
        block_q: Queries in a block.
        block_k: Keys in a block.
    """
    query, key, value = heard.query[None], heard.key[None], heard.value[None]
    new = query.shape[2]
    real = torch.ones(1, new, dtype=torch.bool)
    return SparseCut(EagerBuilder(), heard.layer, 1, query, key, value, real, 0, new, new, heard.scale, heard.softcap,
                     block_q, block_k)  # fmt: skip
