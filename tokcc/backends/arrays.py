"""Tensors as arrays and back, bfloat16 included, of which numpy has no type of its own."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

__all__ = ["to_array", "to_tensor"]

Array = npt.NDArray[Any]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as an array with the same memory; one in bfloat16 has the type of `ml_dtypes`."""
    value = tensor.detach().cpu()
    if value.dtype != torch.bfloat16:
        return np.asarray(value.numpy())
    return np.asarray(value.view(torch.int16).numpy()).view(_BFLOAT16)


def to_tensor(array: Array) -> torch.Tensor:
    """Return an array as a tensor, with the same memory where that is possible."""
    value = np.ascontiguousarray(array).reshape(np.shape(array))  # what has no axes keeps none
    if value.dtype != _BFLOAT16:
        return torch.as_tensor(value)
    return torch.as_tensor(value.view(np.int16)).view(torch.bfloat16)
