"""Reference of ``tokcc::gather_tokens``."""

import torch
from torch import Tensor


def reference(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """See :func:`tokcc.kernels.gather_tokens.gather_tokens`."""
    dim, batch_dim = dim % x.ndim, batch_dim % x.ndim
    front = x.movedim((batch_dim, dim), (0, 1))  # [B or 1, N, ...]
    front = front.expand(index.shape[0], *front.shape[1:])
    rows = torch.arange(index.shape[0], device=x.device)[:, None]
    return front[rows, index].movedim((0, 1), (batch_dim, dim)).contiguous()
