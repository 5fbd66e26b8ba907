"""Reference of ``tokcc::dpp_select``."""

import torch
from torch import Tensor

from tokcc.kernels.picking import Pick, best, picked_first

SPANNED = 1e-5
"""Share of its own diagonal entry below which a token's gain is rounding: the picked tokens span it."""


def reference(kernel: Tensor, unary: Tensor, k: int, pick: Pick = best) -> Tensor:
    """See :func:`tokcc.kernels.dpp_select.dpp_select`."""
    batch, tokens = unary.shape
    rows = torch.arange(batch, device=unary.device)
    picked = torch.zeros(batch, tokens, dtype=torch.bool, device=unary.device)
    gain = torch.diagonal(kernel, dim1=1, dim2=2).clone()
    floor = SPANNED * gain
    factor = kernel.new_zeros(batch, tokens, k)
    for step in range(k):
        gain = torch.where(gain > floor, gain, 0.0)
        choice = pick(gain + unary, picked)
        picked[rows, choice] = True
        own = gain[rows, choice][:, None]
        row = kernel[rows, choice] - (factor @ factor[rows, choice][:, :, None])[:, :, 0]
        column = torch.where(own > 0, row / own.clamp_min(torch.finfo(own.dtype).tiny).sqrt(), 0.0)
        factor[:, :, step] = column
        gain = gain - column * column
    return picked_first(picked, k)
