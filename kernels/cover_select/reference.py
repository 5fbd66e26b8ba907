"""Reference of ``tokcc::cover_select``."""

import torch
from torch import Tensor

from tokcc.kernels.picking import Pick, best, picked_first


def reference(table: Tensor, unary: Tensor, k: int, pick: Pick = best) -> Tensor:
    """See :func:`tokcc.kernels.cover_select.cover_select`."""
    batch, tokens = unary.shape
    rows = torch.arange(batch, device=unary.device)
    picked = torch.zeros(batch, tokens, dtype=torch.bool, device=unary.device)
    covered = table.new_zeros(batch, table.shape[1])
    for _ in range(k):
        gain = (table - covered[:, :, None]).clamp_min(0.0).sum(1)
        choice = pick(gain + unary, picked)
        picked[rows, choice] = True
        covered = torch.maximum(covered, table[rows, :, choice])
    return picked_first(picked, k)
