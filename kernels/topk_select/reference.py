"""Reference of ``tokcc::topk_select``."""

import torch
from torch import Tensor


def reference(score: Tensor, k: int, ascending: bool) -> Tensor:
    """See :func:`tokcc.kernels.topk_select.topk_select`."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.sort(order, dim=-1).values if ascending else order.contiguous()
