"""``tokcc::retain_slots``: which cache entries stay."""

import torch
from torch import Tensor

from tokcc.kernels.gpu import on_cuda
from tokcc.kernels.retain_slots.reference import reference

__all__ = ["retain_slots"]


@torch.library.custom_op("tokcc::retain_slots", mutates_args=())
def retain_slots(rating: Tensor, k: int) -> Tensor:
    """Return the best entries of each sample and head, in the order of the cache.

    Equal ratings: the lower slot (the older token) stays.

    Args:
        rating: ``[B, H, L]``.
        k: Entries that stay, at most L.

    Returns:
        int64 ``[B, H, k]``, ascending.
    """
    return reference(rating, k)


@retain_slots.register_fake
def _(rating: Tensor, k: int) -> Tensor:
    return rating.new_empty([*rating.shape[:2], k], dtype=torch.int64)


on_cuda(retain_slots, __name__, reference)
