"""Triton launch of ``tokcc::retain_slots``: a head of a sample is a row of ``topk_select``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcc.kernels.gpu import Runner, plain
from tokcc.kernels.topk_select.triton import launch as select

__all__ = ["launch", "retain_slots_triton"]


def launch(rating: Tensor, k: int, *, run: Runner = plain) -> Tensor:
    """Run the kernel; arguments as :func:`tokcc.kernels.retain_slots.retain_slots`."""
    return select(rating.flatten(0, 1), k, True, run=run).reshape([*rating.shape[:2], k])


@torch.library.triton_op("tokcc::retain_slots_triton", mutates_args=())
def retain_slots_triton(rating: Tensor, k: int) -> Tensor:
    """Launch the kernel where Inductor can see it."""
    return launch(rating, k, run=torch.library.wrap_triton)
