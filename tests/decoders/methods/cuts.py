"""Cache cuts of plain tensors, to try single pieces without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcc.ir.builder import EagerBuilder
from tokcc.kernels.cached_attention import cached_attention
from tokcc.passes.cache.cut import CacheCut

__all__ = ["cut_of"]


def cut_of(
    key: Tensor,
    *,
    value: Tensor | None = None,
    capacity: int = 0,
    new: int | None = None,
    padding: tuple[int, ...] = (),
    sinks: int = 0,
    recent: int = 0,
    softcap: float = 0.0,
    states: dict[str, Tensor] | None = None,
) -> CacheCut:
    """Make a cut of keys ``[B, Hkv, L, D]`` with two query heads to a key head."""
    batch, heads, total, width = key.shape
    new = total if new is None else new
    value = key if value is None else value
    real = torch.ones(batch, total, dtype=torch.bool)
    for row, count in enumerate(padding):
        real[row, :count] = False
    query = torch.randn(batch, 2 * heads, new, width, generator=torch.Generator().manual_seed(7))
    _, received = cached_attention(query, key, value, real, 0, width**-0.5, softcap)
    empty: dict[str, Any] = {} if states is None else dict(states)
    return CacheCut(
        b=EagerBuilder(),
        layer=0,
        num_layers=1,
        query=query,
        key=key,
        value=value,
        real=real,
        received=received,
        past=total - new,
        new=new,
        total=total,
        seen=total,
        scale=width**-0.5,
        softcap=softcap,
        capacity=capacity,
        sinks=sinks,
        recent=recent,
        states=empty,
    )
