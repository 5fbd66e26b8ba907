"""``tokcc::sparse_decode``: attention of one query to listed tokens or pages of the cache."""

import torch
from torch import Tensor

from tokcc.kernels.gpu import on_cuda
from tokcc.kernels.sparse_decode.reference import reference

__all__ = ["sparse_decode"]


@torch.library.custom_op("tokcc::sparse_decode", mutates_args=())
def sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    page: int,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend from the newest token to the listed pages.

    The softmax runs over the listed tokens. A head whose list holds no token that may be seen gets zeros.

    Args:
        query: ``[B, H, 1, D]``.
        key: ``[B, Hkv, Nk, D]``; query head ``h`` reads key head ``h // (H // Hkv)``.
        value: ``[B, Hkv, Nk, Dv]``.
        index: int32 ``[B, Hs, K]`` with Hs one of 1, Hkv, H: pages of ``page`` tokens, unique among the first
            ``count``; slots behind them are padding and repeat a valid id. The last page may end behind the cache.
        count: int32 ``[B, Hs]``, at most K.
        page: Tokens in a page; 1 = ``index`` lists tokens.
        scale: Factor of the logits.
        valid: bool ``[B, Nk]``: tokens that are not padding; None = all.
        softcap: ``softcap * tanh(logits / softcap)`` before the softmax; 0 = none.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    return reference(query, key, value, index, count, page, scale, valid, softcap)


@sparse_decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    page: int,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    return query.new_empty([*query.shape[:3], value.shape[3]])


on_cuda(sparse_decode, __name__, reference)
