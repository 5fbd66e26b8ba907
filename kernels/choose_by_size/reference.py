"""Reference of ``tokcc::choose_by_size``."""

from collections.abc import Sequence

from torch import Tensor


def reference(
    otherwise: Tensor, inside: Tensor, sizes: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> Tensor:
    """See :func:`tokcc.kernels.choose_by_size.choose_by_size`."""
    fits = all(least <= size <= most for size, least, most in zip(sizes, low, high, strict=True))
    return (inside if fits else otherwise).clone()
