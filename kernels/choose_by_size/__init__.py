"""``tokcc::choose_by_size``: one of two results, by sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokcc.kernels.choose_by_size.reference import reference

__all__ = ["choose_by_size"]


@torch.library.custom_op("tokcc::choose_by_size", mutates_args=())
def choose_by_size(
    otherwise: Tensor, inside: Tensor, sizes: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> Tensor:
    """Return ``inside`` where every size lies between its bounds, both included, and ``otherwise`` where not.

    A runtime that can branch computes only what it returns: what nothing else reads goes into its branch.

    Args:
        otherwise: A tensor.
        inside: Another one of its shape and dtype.
        sizes: Sizes of the call, for instance new tokens and all tokens.
        low: Least value of each.
        high: Largest value of each.

    Returns:
        One of the two.
    """
    return reference(otherwise, inside, sizes, low, high)


@choose_by_size.register_fake
def _(otherwise: Tensor, inside: Tensor, sizes: Sequence[int], low: Sequence[int], high: Sequence[int]) -> Tensor:
    return torch.empty_like(otherwise)
