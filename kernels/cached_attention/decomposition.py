"""``tokcc::cached_attention`` in aten operations: all queries at once."""

from torch import Tensor

from tokcc.kernels.cached_attention.reference import probabilities


def decomposition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    window: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tokcc.kernels.cached_attention.cached_attention`.

    The reference's loop over blocks of queries would fix their number while a program is traced.
    """
    rows, length = query.shape[2], key.shape[2]
    probs = probabilities(query, key, real, window, scale, softcap, bias)  # [B, Hkv, G, R, L]
    out = probs.to(value.dtype) @ value[:, :, None]
    counted = real[:, None, None, length - rows :, None]
    received = (probs * counted).sum(3).mean(2)
    return out.reshape(*query.shape[:3], value.shape[3]), received
