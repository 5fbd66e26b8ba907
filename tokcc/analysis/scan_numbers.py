"""Numbers of scans: what their states remember of a text, and which steps make up as much of a longer one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["remembered", "thresholds"]


def remembered(steps: Tensor, rates: Tensor) -> Tensor:
    """Return what is left of each channel's first state after a text: ``exp(sum_t rate * step_t)``.

    LongMamba (arXiv:2504.16053, eq. 4) has one rate for each channel; of several, their mean is taken.

    Args:
        steps: ``[S, D]``.
        rates: ``[D, N]``, negative.

    Returns:
        fp64 ``[D]``.
    """
    return torch.exp(steps.double().sum(0)[:, None] * rates.double()).mean(1)


def thresholds(steps: Tensor, length: int) -> Tensor:
    """Return for each channel the step size above which the steps of a longer text add up to those of a given one.

    The longer text has the steps of the given one in the same proportions: they are sorted and stretched, as
    LongMamba's code does.

    Args:
        steps: ``[S, D]``.
        length: Tokens of the longer text, more than S.

    Returns:
        fp64 ``[D]``: the largest step size that is not among those.
    """
    ordered = steps.double().sort(0, descending=True).values.T  # [D, S]
    stretched = functional.interpolate(ordered[:, None], size=length, mode="linear", align_corners=False)[:, 0]
    enough = stretched.cumsum(1) > ordered.sum(1, keepdim=True)
    # The number of steps that just exceed the sum is the place of the next smaller one.
    place = enough.to(torch.int64).argmax(1, keepdim=True) + 1
    return stretched.gather(1, place.clamp(max=length - 1))[:, 0]
