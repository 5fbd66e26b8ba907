"""``tokcc::choose_by_size`` in aten operations: both results are computed where sizes are not known before."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def decomposition(
    otherwise: Tensor, inside: Tensor, sizes: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> Tensor:
    """See :func:`tokcc.kernels.choose_by_size.choose_by_size`."""
    known_or_not: Sequence[Any] = sizes  # ints and SymInts; the stubs know ints only
    open_ones: list[Tensor] = []
    for size, least, most in zip(known_or_not, low, high, strict=True):
        if isinstance(size, int):
            if not least <= size <= most:
                return otherwise.clone()
            continue
        # A comparison in Python would fix the size while a program is traced.
        known = torch.full((), size, dtype=torch.int64, device=otherwise.device)
        open_ones.append((known >= least) & (known <= most))
    if not open_ones:
        return inside.clone()
    fits = open_ones[0]
    for each in open_ones[1:]:
        fits = fits & each
    return torch.where(fits, inside, otherwise)
