"""``tokcc::topk_select``: the positions of the k largest scores, ties to the lower position."""

import torch
from torch import Tensor

from tokcc.kernels.gpu import on_cuda
from tokcc.kernels.topk_select.reference import reference

__all__ = ["topk_select"]


@torch.library.custom_op("tokcc::topk_select", mutates_args=())
def topk_select(score: Tensor, k: int, ascending: bool) -> Tensor:
    """Select by score, stably.

    Args:
        score: ``[B, N]``, any real dtype.
        k: How many, at most N.
        ascending: Return positions in ascending order; otherwise by falling score.

    Returns:
        int64 ``[B, k]``. Among equal scores the lower position wins, in every backend.
    """
    return reference(score, k, ascending)


@topk_select.register_fake
def _(score: Tensor, k: int, ascending: bool) -> Tensor:
    return score.new_empty([score.shape[0], k], dtype=torch.int64)


on_cuda(topk_select, __name__, reference)
