"""Reference of ``tokcc::greedy_select``."""

import torch
from torch import Tensor


def reference(similarity: Tensor, unary: Tensor, first: Tensor, k: int) -> Tensor:
    """See :func:`tokcc.kernels.greedy_select.greedy_select`."""
    batch, tokens = unary.shape
    rows = torch.arange(batch, device=unary.device)
    picked = torch.zeros(batch, tokens, dtype=torch.bool, device=unary.device)
    nearest = torch.full_like(unary, -torch.inf)
    score = first
    for _ in range(k):
        # torch.max does not promise the lowest index among ties; a stable sort does.
        choice = torch.sort(score.masked_fill(picked, -torch.inf), dim=-1, descending=True, stable=True).indices[:, 0]
        picked[rows, choice] = True
        nearest = torch.maximum(nearest, similarity[rows, choice])
        score = unary - nearest
    return torch.sort(picked.to(torch.int8), dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
