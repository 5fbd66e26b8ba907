"""Functions that run on the device, shared by the Triton kernels."""

import triton
import triton.language as tl

__all__ = ["capped", "exp2_shift", "load", "logits_of", "row_sums"]


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


@triton.jit
def logits_of(
    q,
    K,
    at,
    keys,
    k_n,
    Mask,
    m_n,
    own,
    scale,
    d,
    D: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """Return the logits of a tile to the base 2, -inf where hidden."""
    real = at < keys
    k = load(K + at[:, None].to(tl.int64) * k_n + d[None, :], real[:, None] & (d < D)[None, :], UP)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = own[:, None] & real[None, :]
    if MASK == 1:
        seen = seen & (tl.load(Mask + at[None, :].to(tl.int64) * m_n, mask=seen, other=0) != 0)
    if MASK == 2:
        bias = tl.load(Mask + at[None, :].to(tl.int64) * m_n, mask=seen)
        logits += tl.where(seen, bias.to(tl.float32), 0.0) * 1.4426950408889634
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def row_sums(
    q,
    k,
    keys,
    k_n,
    mask,
    m_n,
    own,
    scale,
    d,
    BR: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """Return the largest logit of every row to the base 2, and the sum of the exponentials beside it."""
    peak = tl.full([BR], float("-inf"), tl.float32)
    mass = tl.zeros([BR], tl.float32)
    for start in range(0, keys, BN):
        key = start + tl.arange(0, BN)
        logits = logits_of(q, k, key, keys, k_n, mask, m_n, own, scale, d, D, MASK, PRECISION, UP)
        raised = tl.maximum(peak, tl.max(logits, 1))
        shift = exp2_shift(raised)
        mass = mass * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = raised
    return peak, mass
