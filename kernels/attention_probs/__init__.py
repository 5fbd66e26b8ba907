"""``tokcc::attention_probs``: attention probabilities of chosen query rows."""

import torch
from torch import Tensor

from tokcc.kernels.attention_probs.reference import reference
from tokcc.kernels.gpu import on_cuda

__all__ = ["attention_probs"]


@torch.library.custom_op("tokcc::attention_probs", mutates_args=())
def attention_probs(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention probabilities beside an unchanged fused attention.

    Args:
        query: ``[B, H, R, D]``: the rows that are asked for.
        key: ``[B, H, N, D]``.
        mask: Broadcastable to ``[B, H, R, N]``: bool (True = may attend) or additive float; or None.
        scale: Factor of the logits.

    Returns:
        ``[B, H, R, N]``. A row that may attend to nothing is zero.
    """
    return reference(query, key, mask, scale)


@attention_probs.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty([query.shape[0], query.shape[1], query.shape[2], key.shape[2]])


on_cuda(attention_probs, __name__, reference)
