"""Reference of ``tokcc::attention_columns``."""

import torch
from torch import Tensor

from tokcc.kernels.attention_probs.reference import reference as attention_probs


def reference(
    query: Tensor, key: Tensor, mask: Tensor | None, votes: Tensor | None, scale: float, others: bool
) -> Tensor:
    """See :func:`tokcc.kernels.attention_columns.attention_columns`."""
    probs = attention_probs(query, key, mask, scale)  # [B, H, R, N]
    if others:
        rows, keys = (torch.arange(probs.shape[axis], device=probs.device) for axis in (2, 3))
        probs = probs * (rows[:, None] != keys).to(probs.dtype)
    if votes is None:
        return probs.sum(2)
    return (votes.to(probs.dtype)[:, None, None] @ probs).squeeze(2)
