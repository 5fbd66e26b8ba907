"""``tokcc::cover_select``: the greedy best cover."""

import torch
from torch import Tensor

from tokcc.kernels.cover_select.reference import reference

__all__ = ["cover_select"]


@torch.library.custom_op("tokcc::cover_select", mutates_args=())
def cover_select(table: Tensor, unary: Tensor, k: int) -> Tensor:
    """Greedy facility location: pick the tokens that cover all rows of a table best.

    Each pick is ``argmax_i sum_r max(0, table_{r,i} - best_r) + unary_i`` over the tokens not yet picked, where
    ``best_r`` is the largest entry of row ``r`` at a picked token, 0 at first. Ties go to the lower position.

    Args:
        table: ``[B, R, N]``, fp32: how well each token covers each row, at least 0.
        unary: ``[B, N]``, fp32: 0, or at most -1e30 for tokens that may only be picked when nothing else is left.
        k: How many, at least 1 and at most N.

    Returns:
        int64 ``[B, k]``, ascending.
    """
    return reference(table, unary, k)


@cover_select.register_fake
def _(table: Tensor, unary: Tensor, k: int) -> Tensor:
    return table.new_empty([table.shape[0], k], dtype=torch.int64)
