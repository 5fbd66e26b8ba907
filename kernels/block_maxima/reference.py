"""Reference of ``tokcc::block_maxima``: the whole map at once."""

import torch
from torch import Tensor


def reference(
    query: Tensor, key: Tensor, query_bias: Tensor, key_bias: Tensor, valid: Tensor, block_q: int, block_k: int
) -> Tensor:
    """See :func:`tokcc.kernels.block_maxima.block_maxima`."""
    batch, heads, rows, width = query.shape
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, width)
    logits = (grouped @ key[:, :, None].transpose(3, 4)).flatten(1, 2).float()
    logits = logits + query_bias[..., None] + key_bias[:, :, None]
    own = torch.arange(length - rows, length, device=query.device)
    seen = (torch.arange(length, device=query.device) <= own[:, None]) & valid[:, None, None]
    logits = logits.masked_fill(~seen, -1e30)
    # What is missing to a whole block repeats the last one: the largest stays what it is.
    row_blocks, blocks = (rows + (block_q - 1)) // block_q, (length + (block_k - 1)) // block_k
    row = torch.arange(row_blocks * block_q, device=query.device).clamp(max=rows - 1)
    column = torch.arange(blocks * block_k, device=query.device).clamp(max=length - 1)
    whole = logits.index_select(2, row).index_select(3, column)
    return whole.reshape(batch, heads, row_blocks, block_q, blocks, block_k).amax((3, 5))
