"""``tokcc::greedy_select``: pick one token, update, repeat."""

import torch
from torch import Tensor

from tokcc.kernels.greedy_select.reference import reference

__all__ = ["greedy_select"]


@torch.library.custom_op("tokcc::greedy_select", mutates_args=())
def greedy_select(similarity: Tensor, unary: Tensor, first: Tensor, k: int, form: str = "nearest") -> Tensor:
    """Greedy selection against redundancy.

    The first pick is ``argmax(first)``; each further one is the best of the tokens not yet picked by

    - ``nearest``: ``unary_i - max_{s picked} similarity_{s,i}``. With ``unary = 0`` this is farthest-point (max-min)
      selection, with a scaled importance it is maximal marginal relevance.
    - ``all``: ``unary_i - sum_{s picked} similarity_{s,i}``; with ``unary = 0`` max-sum selection.
    - ``product``: ``unary_i * (1 - max_{s picked} similarity_{s,i})``.

    Ties go to the lower position.

    Args:
        similarity: ``[B, N, N]``, fp32.
        unary: ``[B, N]``, fp32; at most -1e30 for tokens that may only be picked when nothing else is left. Of a
            product, all at least 1e-12.
        first: ``[B, N]``, fp32: the score of the first pick.
        k: How many, at least 1 and at most N.
        form: See above.

    Returns:
        int64 ``[B, k]``, ascending.
    """
    return reference(similarity, unary, first, k, form)


@greedy_select.register_fake
def _(similarity: Tensor, unary: Tensor, first: Tensor, k: int, form: str = "nearest") -> Tensor:
    return similarity.new_empty([similarity.shape[0], k], dtype=torch.int64)
