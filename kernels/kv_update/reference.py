"""Reference of ``kv_update``."""

from torch import Tensor


def reference(cache: Tensor, new: Tensor, place: Tensor) -> Tensor:
    """Return the cache with the new entries in their places; see :func:`tokcc.kernels.kv_update.triton.launch`."""
    return cache.index_copy(2, place, new)
