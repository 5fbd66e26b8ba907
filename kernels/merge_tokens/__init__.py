"""``tokcc::merge_tokens``: keep some tokens and average others into them."""

import torch
from torch import Tensor

from tokcc.kernels.gpu import on_cuda
from tokcc.kernels.merge_tokens.reference import reference

__all__ = ["merge_tokens"]


@torch.library.custom_op("tokcc::merge_tokens", mutates_args=())
def merge_tokens(
    x: Tensor, weight: Tensor | None, keep: Tensor, source: Tensor, slot: Tensor, first: int, padded: bool
) -> tuple[Tensor, Tensor]:
    """Merge source tokens into kept ones, weighted by how many tokens each stands for.

    ``x'_k = (w_k x_k + sum_{a: slot_a = k} w_a x_a) / w'_k`` with ``w'_k = w_k + sum w_a`` (ToMe, arXiv:2210.09461,
    section 3). A slot that stands for padding only (all weights 0) holds zeros.

    Args:
        x: ``[B, N, C]``.
        weight: ``[B, N]`` in the dtype of ``x``, or None for all ones.
        keep: int64 ``[B, K]``: the kept tokens, in output order.
        source: int64 ``[B, R]``: the tokens that are merged away, none of them kept.
        slot: int64 ``[B, R]``: the kept token that each source joins, counted from the kept token ``first``. A source
            whose slot lies behind the last kept token joins nothing.
        first: Kept tokens before these, which nothing joins.
        padded: Some weights may be 0 (padding).

    Returns:
        ``x'`` ``[B, K, C]`` and ``w'`` ``[B, K]``.
    """
    return reference(x, weight, keep, source, slot, first, padded)


@merge_tokens.register_fake
def _(
    x: Tensor, weight: Tensor | None, keep: Tensor, source: Tensor, slot: Tensor, first: int, padded: bool
) -> tuple[Tensor, Tensor]:
    batch, kept = keep.shape
    return x.new_empty([batch, kept, x.shape[2]]), x.new_empty([batch, kept])


on_cuda(merge_tokens, __name__, reference)
