"""Reference of ``tokcc::split_blocks``."""

import torch
from torch import Tensor


def reference(x: Tensor, axis: int, block: int) -> Tensor:
    """See :func:`tokcc.kernels.split_blocks.split_blocks`."""
    size = x.shape[axis]
    blocks = (size + (block - 1)) // block
    # Taken by their places, of which none is fixed by tracing: what is missing to a whole block may be 0 or 1.
    filled = torch.cat([x, x.new_zeros([*x.shape[:axis], 1, *x.shape[axis + 1 :]])], axis)
    place = torch.arange(blocks * block, device=x.device).clamp(max=size)
    return filled.index_select(axis, place).reshape([*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]])
