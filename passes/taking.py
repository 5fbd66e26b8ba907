"""Taking tokens by index, from streams and from what is kept per token."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.passes.cut import Cut

__all__ = ["take"]


def take(cut: Cut, values: Any, index: Any) -> Any:
    """Take tokens of ``[B, N, ...]`` by ``[B, K]`` or ``[K]``."""
    b = cut.b
    if len(b.shape(index)) == 1:
        return b.call(torch.ops.aten.index_select.default, values, 1, index)
    if len(b.shape(values)) == 2:
        return b.gather(values, 1, index)
    return b.call(torch.ops.tokcc.gather_tokens.default, values, index, 1, 0)
