"""Reference of ``tokcc::attention_probs``."""

import torch
from torch import Tensor


def reference(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See :func:`tokcc.kernels.attention_probs.attention_probs`."""
    logits = (query * scale) @ key.transpose(-1, -2)  # [B, H, R, N]
    if mask is None:
        return torch.softmax(logits, dim=-1)
    hidden = mask.dtype == torch.bool
    logits = logits.masked_fill(~mask, -torch.inf) if hidden else logits + mask
    return torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0)
