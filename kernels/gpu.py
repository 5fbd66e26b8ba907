"""The host side that the Triton kernels share: when they run, on which architecture, with which launcher.

Nothing here imports triton: an operation's Triton module is imported by its first call on a CUDA tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

__all__ = [
    "BASE_ARCH",
    "Runner",
    "arch_of",
    "has_triton",
    "interpreted",
    "multiprocessors",
    "on_cuda",
    "plain",
    "pow2",
    "precision",
    "row_major",
]

Runner = Callable[[Any], Any]
"""What makes a kernel launchable: :func:`plain`, or ``torch.library.wrap_triton`` inside a ``triton_op``."""

BASE_ARCH = 80
"""The oldest architecture with kernels: older ones spill without their tensor cores."""

_MULTIPROCESSORS = 108
"""What a launch is planned for where no device says how many it has."""


def plain(kernel: Any) -> Any:
    """Launch the kernel as it is."""
    return kernel


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_triton() -> bool:
    """Return whether triton is installed; it is not imported for it."""
    return util.find_spec("triton") is not None


def on_cuda(op: CustomOpDef, package: str, reference: Callable[..., Any]) -> None:
    """Let CUDA tensors go to ``launch`` of the package's ``triton`` module, which is imported by the first of them.

    Args:
        op: The operation.
        package: Its package, such as ``tokcc.kernels.gather_tokens``.
        reference: What runs where triton is not installed or the device is older than its kernels.
    """

    def kernel(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not has_triton() or arch_of(device) < BASE_ARCH:
            return reference(*args)
        return import_module(f"{package}.triton").launch(*args)

    op.register_kernel("cuda")(kernel)


def arch_of(device: torch.device) -> int:
    """Return the architecture, 90 for sm_90; :data:`BASE_ARCH` for tensors that the interpreter works on."""
    if device.type != "cuda":
        return BASE_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Return how many blocks of threads the device works on at a time, at least."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def pow2(n: int) -> int:
    """Return the least power of two that is not below ``n``: the shapes of Triton's tensors."""
    return 1 << max(n - 1, 0).bit_length()


def row_major(x: Tensor) -> Tensor:
    """Return ``x`` with a last axis without gaps, which the kernels count on."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def precision(dtype: torch.dtype, wide: int) -> str:
    """Return how ``tl.dot`` multiplies, for rows of ``wide`` numbers.

    One TF32 product is too coarse for fp32. Three of them are fp32 to a few units in the last place; for rows above 128
    they do not fit in the registers, so those are multiplied one by one.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32x3" if wide <= 128 else "ieee"
