"""Reference of ``tokcc::recurrence``."""

import torch
from torch import Tensor


def reference(decay: Tensor, update: Tensor, axis: int, initial: Tensor | None = None) -> Tensor:
    """See :func:`tokcc.kernels.recurrence.recurrence`."""
    if decay.shape != update.shape:
        raise ValueError(f"decay {list(decay.shape)} and update {list(update.shape)} differ in shape")
    states = torch.empty(update.shape, dtype=update.dtype, device=update.device)
    state = torch.zeros_like(update.select(axis, 0)) if initial is None else initial
    if state.shape != update.select(axis, 0).shape:
        raise ValueError(f"the first state {list(state.shape)} is not one of {list(update.shape)} without axis {axis}")
    for t in range(update.shape[axis]):
        state = decay.select(axis, t) * state + update.select(axis, t)
        states.select(axis, t).copy_(state)
    return states
