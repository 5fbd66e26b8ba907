"""``tokcc::block_sparse_attention``: every block of queries attends to the blocks of keys that it lists."""

import torch
from torch import Tensor

from tokcc.kernels.block_sparse_attention.reference import reference
from tokcc.kernels.gpu import on_cuda

__all__ = ["block_sparse_attention"]


@torch.library.custom_op("tokcc::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend to listed blocks of keys; the softmax is over what is listed and visible.

    The S queries belong to the last S of the L keys: where attention is causal, query ``i`` sees the keys up to
    ``L - S + i``. The lists have ``MQ = ceil(S / block_q)`` rows; a block of keys begins at a multiple of ``block_k``
    and the last one may be cut short. What a query attends to that sees nothing is not defined, but finite.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, L, D]``; query head ``h`` reads key head ``h // (H // Hkv)``. Where ``valid`` is given there may
            be more keys than it tells of, which are not there yet.
        value: ``[B, Hkv, L, Dv]``; as many as keys.
        index: int64 or int32 ``[B, Hs, MQ, K]`` with Hs of 1, Hkv or H: blocks of keys, unique up to the count, in any
            order; behind it any blocks that exist.
        count: The same dtype, ``[B, Hs, MQ]``: how many of them are meant, at least 1.
        block_q: Queries in a block.
        block_k: Keys in a block.
        causal: Whether queries see only keys up to their own.
        scale: Factor of the logits.
        valid: bool ``[B, L]``: keys that may be seen; None = all. It says what L is.
        softcap: ``softcap * tanh(logits / softcap)`` before the softmax; 0 = none.
        bias: ``[B, Hkv, L]``, added to the logits behind the cap; None = none. There may be more, as of keys.

    Returns:
        ``[B, H, S, Dv]``.
    """
    return reference(query, key, value, index, count, block_q, block_k, causal, scale, valid, softcap, bias)


@block_sparse_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    return query.new_empty([*query.shape[:3], value.shape[3]])


on_cuda(block_sparse_attention, "tokcc.kernels.block_sparse_attention", reference)
