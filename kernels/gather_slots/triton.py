"""Triton launch of ``tokcc::gather_slots``: a head of a sample is a sample of ``gather_tokens``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcc.kernels.gather_tokens.triton import take
from tokcc.kernels.gpu import Runner, plain

__all__ = ["gather_slots_triton", "launch"]


def launch(x: Tensor, index: Tensor, *, run: Runner = plain) -> Tensor:
    """Run the kernel; arguments as :func:`tokcc.kernels.gather_slots.gather_slots`."""
    return take(x.flatten(0, 1), index.flatten(0, 1), 1, 0, run).reshape([*index.shape, *x.shape[3:]])


@torch.library.triton_op("tokcc::gather_slots_triton", mutates_args=())
def gather_slots_triton(x: Tensor, index: Tensor) -> Tensor:
    """Launch the kernel where Inductor can see it."""
    return launch(x, index, run=torch.library.wrap_triton)
