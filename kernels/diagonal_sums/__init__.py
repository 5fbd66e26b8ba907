"""``tokcc::diagonal_sums``: what the last queries give to keys at each distance."""

import torch
from torch import Tensor

from tokcc.kernels.diagonal_sums.reference import reference

__all__ = ["diagonal_sums"]


@torch.library.custom_op("tokcc::diagonal_sums", mutates_args=())
def diagonal_sums(probs: Tensor) -> Tensor:
    """Sum a causal table of the last R of L tokens along its diagonals (MInference, arXiv:2407.02490).

    Args:
        probs: ``[..., R, L]``: row ``r`` belongs to token ``L - R + r``; what lies behind a row's own token is zero.

    Returns:
        ``[..., L]``: the sum of row ``r`` and column ``L - R + r - d`` over all rows that reach so far, by distance d.
    """
    return reference(probs)


@diagonal_sums.register_fake
def _(probs: Tensor) -> Tensor:
    return probs.new_empty([*probs.shape[:-2], probs.shape[-1]])
