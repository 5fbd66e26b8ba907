"""``tokcc::attention_columns``: the attention that every key receives, summed over queries."""

import torch
from torch import Tensor

from tokcc.kernels.attention_columns.reference import reference
from tokcc.kernels.gpu import on_cuda

__all__ = ["attention_columns"]


@torch.library.custom_op("tokcc::attention_columns", mutates_args=())
def attention_columns(
    query: Tensor, key: Tensor, mask: Tensor | None, votes: Tensor | None, scale: float, others: bool
) -> Tensor:
    """Column sums of the attention probabilities; the map itself need not exist.

    Args:
        query: ``[B, H, R, D]``.
        key: ``[B, H, N, D]``.
        mask: Broadcastable to ``[B, H, R, N]``: bool (True = may attend) or additive float; or None.
        votes: ``[B, R]``: what the row of a query counts; None = 1.
        scale: Factor of the logits.
        others: Leave out what a token pays to itself: entry ``n`` of row ``n``.

    Returns:
        ``[B, H, N]``: ``sum_r votes[b, r] * p[b, h, r, n]``. A row that may attend to nothing pays nothing.
    """
    return reference(query, key, mask, votes, scale, others)


@attention_columns.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, votes: Tensor | None, scale: float, others: bool) -> Tensor:
    return query.new_empty([query.shape[0], query.shape[1], key.shape[2]])


on_cuda(attention_columns, __name__, reference)
