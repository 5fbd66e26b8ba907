"""Reference of ``tokcc::diagonal_sums``."""

import torch
from torch import Tensor


def reference(probs: Tensor) -> Tensor:
    """See :func:`tokcc.kernels.diagonal_sums.diagonal_sums`."""
    rows, length = probs.shape[-2:]
    own = torch.arange(length - rows, length, device=probs.device)[:, None]
    column = own - torch.arange(length, device=probs.device)  # [R, L], by distance
    taken = probs.gather(-1, column.clamp(min=0).expand(probs.shape))
    return (taken * (column >= 0)).sum(-2)
