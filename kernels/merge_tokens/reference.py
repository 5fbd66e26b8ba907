"""Reference of ``tokcc::merge_tokens``."""

import torch
from torch import Tensor


def reference(
    x: Tensor, weight: Tensor | None, keep: Tensor, source: Tensor, slot: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """See :func:`tokcc.kernels.merge_tokens.merge_tokens`."""
    del first
    if weight is None:
        weight = x.new_ones(x.shape[:2])
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    total = weight[rows, keep]  # [B, K]
    total = total.scatter_add(1, slot, weight[rows, source])
    # A slot that stands for padding only has weight 0; what it holds does not matter, but it must be finite.
    share = weight[rows, source] / total.gather(1, slot).clamp_min(torch.finfo(x.dtype).tiny)  # [B, R]
    moved = share[..., None] * (x[rows, source] - x[rows, keep.gather(1, slot)])  # [B, R, C]
    merged = x[rows, keep].scatter_add(1, slot[..., None].expand_as(moved), moved)
    return merged, total
