"""Reference of ``tokcc::scatter_tokens``."""

import torch
from torch import Tensor


def reference(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """See :func:`tokcc.kernels.scatter_tokens.scatter_tokens`."""
    rows = torch.arange(index.shape[0], device=base.device)[:, None]
    return base.contiguous().index_put((rows, index), values)
