"""``tokcc::greedy_select``: pick one token, update, repeat."""

import torch
from torch import Tensor

from tokcc.kernels.greedy_select.reference import reference

__all__ = ["greedy_select"]


@torch.library.custom_op("tokcc::greedy_select", mutates_args=())
def greedy_select(similarity: Tensor, unary: Tensor, first: Tensor, k: int) -> Tensor:
    """Greedy selection against redundancy.

    The first pick is ``argmax(first)``; each further one is ``argmax_i unary_i - max_{s picked} similarity_{s,i}``
    over the tokens not yet picked. With ``unary = 0`` this is farthest-point (max-min) selection, with a scaled
    importance it is maximal marginal relevance. Ties go to the lower position.

    Args:
        similarity: ``[B, N, N]``, fp32.
        unary: ``[B, N]``, fp32; at most -1e30 for tokens that may only be picked when nothing else is left.
        first: ``[B, N]``, fp32: the score of the first pick.
        k: How many, at least 1 and at most N.

    Returns:
        int64 ``[B, k]``, ascending.
    """
    return reference(similarity, unary, first, k)


@greedy_select.register_fake
def _(similarity: Tensor, unary: Tensor, first: Tensor, k: int) -> Tensor:
    return similarity.new_empty([similarity.shape[0], k], dtype=torch.int64)
