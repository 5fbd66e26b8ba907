"""``tokcc::scatter_tokens``: write tokens back to where they came from."""

import torch
from torch import Tensor

from tokcc.kernels.scatter_tokens.reference import reference

__all__ = ["scatter_tokens"]


@torch.library.custom_op("tokcc::scatter_tokens", mutates_args=())
def scatter_tokens(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Return ``base`` with the rows ``index`` replaced.

    Args:
        base: ``[B, N, ...]``: what the other tokens get.
        index: int64 ``[B, K]``, unique in each row.
        values: ``[B, K, ...]``.

    Returns:
        ``[B, N, ...]``.
    """
    return reference(base, index, values)


@scatter_tokens.register_fake
def _(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)
