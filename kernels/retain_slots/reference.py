"""Reference of ``tokcc::retain_slots``."""

import torch
from torch import Tensor


def reference(rating: Tensor, k: int) -> Tensor:
    """See :func:`tokcc.kernels.retain_slots.retain_slots`."""
    best = torch.sort(rating, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.sort(best, dim=-1).values
