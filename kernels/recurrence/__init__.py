"""``tokcc::recurrence``: a state that decays and is added to, token by token."""

import torch
from torch import Tensor

from tokcc.kernels.recurrence.reference import reference

__all__ = ["recurrence"]


@torch.library.custom_op("tokcc::recurrence", mutates_args=())
def recurrence(decay: Tensor, update: Tensor, axis: int, initial: Tensor | None = None) -> Tensor:
    """Run ``state[t] = decay[t] * state[t - 1] + update[t]`` along an axis, from a state of zeros or a given one.

    This is the scan of state-space models (Mamba, arXiv:2312.00752, eq. 2a) once they are discretised.

    Args:
        decay: ``[..., T, ...]``, floating point.
        update: The same shape and dtype.
        axis: Which axis is ``T``.
        initial: The state before the first step: the shape of ``update`` without that axis, and its dtype.

    Returns:
        The states of all steps, in the shape of ``update``.
    """
    return reference(decay, update, axis, initial)


@recurrence.register_fake
def _(decay: Tensor, update: Tensor, axis: int, initial: Tensor | None = None) -> Tensor:
    return update.new_empty(update.shape)
