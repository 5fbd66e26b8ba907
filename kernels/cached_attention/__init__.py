"""``tokcc::cached_attention``: causal attention of new queries over cached and new keys."""

import torch
from torch import Tensor

from tokcc.kernels.cached_attention.reference import reference

__all__ = ["cached_attention"]


@torch.library.custom_op("tokcc::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    window: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally by slot, and sum what every slot receives.

    The S queries belong to the last S of the L slots: query ``i`` stands at slot ``L - S + i`` and sees the slots up to
    its own that are real, and in a sliding window only the last ``window`` of them. Every query sees its own slot, so
    that rows of padding stay finite.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, L, D]``; query head ``h`` reads key head ``h // (H // Hkv)``.
        value: ``[B, Hkv, L, Dv]``.
        real: bool ``[B, L]``: slots that are not padding.
        window: Slots that a query sees, its own included; 0 = all.
        scale: Factor of the logits.
        softcap: ``softcap * tanh(logits / softcap)`` before the softmax; 0 = none.
        bias: fp32 ``[B, Hkv, L]``, added to the capped logits of a slot: the logarithm of how many tokens it stands
            for; None = one each.

    Returns:
        The attended values ``[B, H, S, Dv]``, and fp32 ``[B, Hkv, L]``: the probability that each slot received, summed
        over the real queries and averaged over the query heads of its group (H2O, arXiv:2306.14048).
    """
    return reference(query, key, value, real, window, scale, softcap, bias)


@cached_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    window: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    return (
        query.new_empty([batch, heads, rows, value.shape[3]]),
        query.new_empty([batch, key.shape[1], key.shape[2]], dtype=torch.float32),
    )
