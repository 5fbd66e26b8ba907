"""Sparse pieces without a decoder: the attention of one layer on given tensors, computed at once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tokcc.ir.builder import EagerBuilder
from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseScore, SparseSelector

__all__ = ["EVERYTHING", "cut_of", "look_alike", "read_blocks", "reading"]

EVERYTHING = Count("share", Fraction(1))


def look_alike(heads: int, kv_heads: int, new: int, total: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random queries ``[1, H, S, D]`` and keys ``[1, Hkv, L, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, new, width, generator=generator), torch.randn(
        1, kv_heads, total, width, generator=generator
    )


def cut_of(query: Tensor, key: Tensor, block_q: int, block_k: int, padding: int = 0, **more: Any) -> SparseCut:
    """The attention of a call; values are the keys."""
    new, total = query.shape[2], key.shape[2]
    real = (torch.arange(total) >= padding).expand(len(key), total)
    scale = query.shape[3] ** -0.5
    return SparseCut(
        EagerBuilder(), 0, 1, query, key, key, real, total - new, new, total, scale, 0.0, block_q, block_k, **more
    )


def read_blocks(chosen: BlockList, blocks: int) -> Tensor:
    """What a list says, as a table bool ``[B, Hs, MQ, M]``; refuses one that is not ascending or not unique."""
    table = torch.zeros(*chosen.count.shape, blocks, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in chosen.count.shape)).tolist():
        count = int(chosen.count[tuple(place)])
        listed = chosen.index[tuple(place)][:count].tolist()
        assert count >= 1
        assert listed == sorted(set(listed))
        assert int(chosen.index[tuple(place)].max()) < blocks
        table[(*place, listed)] = True
    return table


def reading(
    cut: SparseCut, score: SparseScore | None, select: SparseSelector, budget: Count = EVERYTHING
) -> tuple[Tensor, Tensor | None]:
    """The blocks that are read, and their ratings."""
    rated = None if score is None else score.emit(cut)
    return read_blocks(select.select(cut, rated, budget), int(cut.blocks)), rated
