"""``tokcc::split_blocks``: an axis cut into blocks of one size."""

import torch
from torch import Tensor

from tokcc.kernels.split_blocks.reference import reference

__all__ = ["split_blocks"]


@torch.library.custom_op("tokcc::split_blocks", mutates_args=())
def split_blocks(x: Tensor, axis: int, block: int) -> Tensor:
    """Cut an axis of N into ``ceil(N / block)`` blocks; the last one is filled up with zeros.

    Args:
        x: Any tensor.
        axis: Which axis, not negative.
        block: Elements of a block.

    Returns:
        ``[..., ceil(N / block), block, ...]``.
    """
    return reference(x, axis, block)


@split_blocks.register_fake
def _(x: Tensor, axis: int, block: int) -> Tensor:
    blocks = (x.shape[axis] + (block - 1)) // block
    return x.new_empty([*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]])
