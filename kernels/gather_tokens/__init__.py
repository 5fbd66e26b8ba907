"""``tokcc::gather_tokens``: take tokens chosen per sample."""

import torch
from torch import Tensor

from tokcc.kernels.gather_tokens.reference import reference
from tokcc.kernels.gpu import on_cuda

__all__ = ["gather_tokens"]


@torch.library.custom_op("tokcc::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Gather along ``dim`` with one index list per sample.

    Args:
        x: Any rank; ``x.shape[batch_dim]`` is B, or 1 for a tensor shared by all samples.
        index: int64 ``[B, K]``.
        dim: The token axis.
        batch_dim: The batch axis.

    Returns:
        ``x`` with ``dim`` of size K and ``batch_dim`` of size B.
    """
    return reference(x, index, dim, batch_dim)


@gather_tokens.register_fake
def _(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    shape = list(x.shape)
    shape[batch_dim], shape[dim] = index.shape[0], index.shape[1]
    return x.new_empty(shape)


on_cuda(gather_tokens, __name__, reference)
