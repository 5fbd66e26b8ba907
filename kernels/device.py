"""Functions that run on the device, shared by the Triton kernels."""

import triton
import triton.language as tl

__all__ = ["capped", "exp2_shift", "load"]


@triton.jit
def load(pointer, mask, UP: tl.constexpr):
    """Load, zero where masked. UP: in fp32, for the interpreter, which knows no bf16 zeros and products."""
    if UP:
        return tl.where(mask, tl.load(pointer, mask=mask).to(tl.float32), 0.0)
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def exp2_shift(peak):
    """Return what to subtract before ``exp2``: the peak, or 0 for a row that has seen nothing yet."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def capped(x, cap):
    """Return ``cap * tanh(x)``."""
    fall = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -cap, cap) * (1.0 - fall) / (1.0 + fall)
