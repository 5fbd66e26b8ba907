"""Places of entries in the order of their scores."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["places"]


def places(b: Builder, score: Any, count: Any) -> Any:
    """Return how many entries of its row are better than each, int64 ``[N, count]``; of equal ones the older is.

    Args:
        b: The builder.
        score: ``[N, count]``.
        count: Size of a row.
    """
    order = b.call(torch.ops.tokcc.topk_select.default, score, count, False)
    rising = b.expand(b.unsqueeze(b.arange(count, score), 0), [b.size(score, 0), -1])
    return b.scatter(order, 1, order, rising)
