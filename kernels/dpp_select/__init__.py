"""``tokcc::dpp_select``: the greedy largest determinant."""

import torch
from torch import Tensor

from tokcc.kernels.dpp_select.reference import SPANNED, reference

__all__ = ["SPANNED", "dpp_select"]


@torch.library.custom_op("tokcc::dpp_select", mutates_args=())
def dpp_select(kernel: Tensor, unary: Tensor, k: int) -> Tensor:
    """Greedy MAP inference of a determinantal point process (Chen et al., arXiv:1709.05135, algorithm 1).

    Each pick is ``argmax_i gain_i + unary_i`` over the tokens not yet picked, where ``gain_i`` is the factor by which
    the determinant of the kernel's rows and columns of the picked tokens grows with token ``i``. A gain that is lost in
    rounding, below ``SPANNED`` of the token's own diagonal entry, counts as 0. Ties go to the lower position.

    Args:
        kernel: ``[B, N, N]``, fp32, symmetric and positive semi-definite.
        unary: ``[B, N]``, fp32: 0, or at most -1e30 for tokens that may only be picked when nothing else is left.
        k: How many, at least 1 and at most N.

    Returns:
        int64 ``[B, k]``, ascending.
    """
    return reference(kernel, unary, k)


@dpp_select.register_fake
def _(kernel: Tensor, unary: Tensor, k: int) -> Tensor:
    return kernel.new_empty([kernel.shape[0], k], dtype=torch.int64)
