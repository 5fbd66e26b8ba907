"""``tokcc::gather_slots``: take cache entries chosen per sample and head."""

import torch
from torch import Tensor

from tokcc.kernels.gather_slots.reference import reference
from tokcc.kernels.gpu import on_cuda

__all__ = ["gather_slots"]


@torch.library.custom_op("tokcc::gather_slots", mutates_args=())
def gather_slots(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the slot axis with one index list per sample and head.

    Args:
        x: ``[B, H, L, ...]``.
        index: int64 ``[B, H, K]``.

    Returns:
        ``[B, H, K, ...]``.
    """
    return reference(x, index)


@gather_slots.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty([*index.shape, *x.shape[3:]])


on_cuda(gather_slots, __name__, reference)
