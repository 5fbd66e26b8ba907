"""What the references of selections share that pick one token after another."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Following", "Pick", "best", "largest", "picked_first"]

Pick = Callable[[Tensor, Tensor], Tensor]
"""Chooses from scores ``[B, N]`` and what is picked already, bool ``[B, N]``: int64 ``[B]``."""


def largest(score: Tensor, picked: Tensor) -> Tensor:
    """Return the position of the largest score among the tokens not yet picked, the lowest of equal ones."""
    # torch.max does not promise the lowest index among ties; a stable sort does.
    return torch.sort(score.masked_fill(picked, -torch.inf), dim=-1, descending=True, stable=True).indices[:, 0]


def best(score: Tensor, picked: Tensor) -> Tensor:
    """Return the position of the largest score ``[B, N]`` among the tokens not yet picked, the lowest of equal ones.

    A score of -1e30 or less is one and the same: such tokens are picked when nothing else is left.
    """
    return largest(score.clamp_min(-1e30), picked)


@dataclass
class Following:
    """Picks only what somebody else has picked, and keeps how much worse that was.

    Attributes:
        chosen: The other's picks, int64 ``[B, K]``, in any order.
        pick: How to choose among them.
        shortfall: The most by which a pick was worse than the best one, ``[B]``; None before the first.
    """

    chosen: Tensor
    pick: Pick
    shortfall: Tensor | None = field(default=None, init=False)

    def __call__(self, score: Tensor, picked: Tensor) -> Tensor:
        """Pick the best of the other's."""
        other = torch.ones_like(picked).scatter(1, self.chosen, value=False)
        own = self.pick(score, picked | other)
        free = score.masked_fill(picked, -torch.inf).amax(-1)
        short = free - score.gather(1, own[:, None])[:, 0]
        self.shortfall = short if self.shortfall is None else torch.maximum(self.shortfall, short)
        return own


def picked_first(picked: Tensor, k: int) -> Tensor:
    """Return the positions of the ``k`` picked tokens, ascending: int64 ``[B, k]``."""
    return torch.sort(picked.to(torch.int8), dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
