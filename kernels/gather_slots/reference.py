"""Reference of ``tokcc::gather_slots``."""

import torch
from torch import Tensor


def reference(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`tokcc.kernels.gather_slots.gather_slots`."""
    samples = torch.arange(index.shape[0], device=x.device)[:, None, None]
    heads = torch.arange(index.shape[1], device=x.device)[None, :, None]
    return x[samples, heads, index].contiguous()
