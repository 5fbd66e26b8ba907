"""What the references of greedy selections share."""

import torch
from torch import Tensor

__all__ = ["best", "picked_first"]


def best(score: Tensor, picked: Tensor) -> Tensor:
    """Return the position of the largest score ``[B, N]`` among the tokens not yet picked, the lowest of equal ones.

    A score of -1e30 or less is one and the same: such tokens are picked when nothing else is left.
    """
    score = score.clamp_min(-1e30).masked_fill(picked, -torch.inf)
    # torch.max does not promise the lowest index among ties; a stable sort does.
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, 0]


def picked_first(picked: Tensor, k: int) -> Tensor:
    """Return the positions of the ``k`` picked tokens, ascending: int64 ``[B, k]``."""
    return torch.sort(picked.to(torch.int8), dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
