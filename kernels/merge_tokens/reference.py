"""Reference of ``tokcc::merge_tokens``."""

import torch
from torch import Tensor


def reference(
    x: Tensor, weight: Tensor | None, keep: Tensor, source: Tensor, slot: Tensor, first: int, padded: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`tokcc.kernels.merge_tokens.merge_tokens`."""
    slot = slot + first
    if weight is None:
        weight = x.new_ones(x.shape[:2])
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    own = weight[rows, keep]  # [B, K]
    joins = slot < keep.shape[1]
    moving = weight[rows, source] * joins  # [B, R]
    slot = slot * joins
    total = own.scatter_add(1, slot, moving)
    # A slot that stands for padding only weighs 0 and holds zeros.
    divisor = total.clamp_min(torch.finfo(x.dtype).tiny) if padded else total
    share = moving / divisor.gather(1, slot)  # [B, R]
    moved = share[..., None] * x[rows, source]  # [B, R, C]
    kept = (own / divisor)[..., None] * x[rows, keep]
    return kept.scatter_add(1, slot[..., None].expand_as(moved), moved), total
