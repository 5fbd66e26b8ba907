"""``tokcc::block_maxima``: the largest of the logits of each block of queries and block of keys."""

import torch
from torch import Tensor

from tokcc.kernels.block_maxima.reference import reference

__all__ = ["block_maxima"]


@torch.library.custom_op("tokcc::block_maxima", mutates_args=())
def block_maxima(
    query: Tensor, key: Tensor, query_bias: Tensor, key_bias: Tensor, valid: Tensor, block_q: int, block_k: int
) -> Tensor:
    """Return the largest ``q . k + query_bias + key_bias`` of what the queries of a block see of a block of keys.

    The S queries belong to the last S of the L keys: query ``i`` sees the keys up to ``L - S + i``. Blocks begin at
    multiples of their size, and the last one may be cut short.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, L, D]``; query head ``h`` reads key head ``h // (H // Hkv)``.
        query_bias: fp32 ``[B, H, S]``.
        key_bias: fp32 ``[B, H, L]``.
        valid: bool ``[B, L]``: keys that may be seen.
        block_q: Queries in a block.
        block_k: Keys in a block.

    Returns:
        fp32 ``[B, H, ceil(S / block_q), ceil(L / block_k)]``; -1e30 where no query of a block sees a key.
    """
    return reference(query, key, query_bias, key_bias, valid, block_q, block_k)


@block_maxima.register_fake
def _(
    query: Tensor, key: Tensor, query_bias: Tensor, key_bias: Tensor, valid: Tensor, block_q: int, block_k: int
) -> Tensor:
    rows, blocks = (query.shape[2] + (block_q - 1)) // block_q, (key.shape[2] + (block_k - 1)) // block_k
    return query.new_empty([*query.shape[:2], rows, blocks], dtype=torch.float32)
