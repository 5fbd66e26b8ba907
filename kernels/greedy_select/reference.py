"""Reference of ``tokcc::greedy_select``."""

import torch
from torch import Tensor

from tokcc.kernels.picking import Pick, largest, picked_first


def reference(
    similarity: Tensor, unary: Tensor, first: Tensor, k: int, form: str = "nearest", pick: Pick = largest
) -> Tensor:
    """See :func:`tokcc.kernels.greedy_select.greedy_select`."""
    batch, tokens = unary.shape
    rows = torch.arange(batch, device=unary.device)
    picked = torch.zeros(batch, tokens, dtype=torch.bool, device=unary.device)
    state = torch.zeros_like(unary) if form == "all" else torch.full_like(unary, -torch.inf)
    score = first
    for _ in range(k):
        choice = pick(score, picked)
        picked[rows, choice] = True
        row = similarity[rows, choice]
        state = state + row if form == "all" else torch.maximum(state, row)
        score = unary * (1.0 - state) if form == "product" else unary - state
    return picked_first(picked, k)
