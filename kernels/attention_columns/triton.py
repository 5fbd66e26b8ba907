"""Triton kernels of ``tokcc::attention_columns``: sums of rows, then sums of columns; no map is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose, dtype_of, kind
from tokcc.kernels.device import exp2_shift, load, logits_of, row_sums
from tokcc.kernels.gpu import Runner, arch_of, interpreted, plain, pow2, precision, row_major

__all__ = ["attention_columns_triton", "cases", "launch"]

_OP = "attention_columns"
_LOG2E = 1.4426950408889634


@triton.jit
def _row_masses(
    Q,
    K,
    Mask,
    Mass,
    rows,
    keys,
    heads,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    m_b,
    m_h,
    m_r,
    m_n,
    scale,
    BR: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """Write the logarithm to the base 2 of every row's sum; +inf for a row that may attend to nothing."""
    tiles = tl.cdiv(rows, BR)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    sample = pair // heads
    head = pair % heads
    row = tl.program_id(0) % tiles * BR + tl.arange(0, BR)
    own = row < rows
    d = tl.arange(0, DP)
    at = row[:, None].to(tl.int64)
    q = load(Q + sample * q_b + head * q_h + at * q_n + d[None, :], own[:, None] & (d < D)[None, :], UP)
    k = K + sample * k_b + head * k_h
    mask = Mask + sample * m_b + head * m_h + at * m_r
    peak, mass = row_sums(q, k, keys, k_n, mask, m_n, own, scale, d, BR, BN, D, MASK, PRECISION, UP)
    total = tl.where(mass > 0, exp2_shift(peak) + tl.log2(tl.where(mass > 0, mass, 1.0)), float("inf"))
    tl.store(Mass + pair * rows + row, total, mask=own)


@triton.jit
def _columns(
    Q,
    K,
    Mask,
    Votes,
    Mass,
    Out,
    rows,
    keys,
    heads,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    m_b,
    m_h,
    m_r,
    m_n,
    scale,
    BR: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    MASK: tl.constexpr,
    VOTES: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    tiles = tl.cdiv(keys, BN)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    sample = pair // heads
    head = pair % heads
    key = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    k = K + sample * k_b + head * k_h
    received = tl.zeros([BN], tl.float32)
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        own = row < rows
        at = row[:, None].to(tl.int64)
        q = load(Q + sample * q_b + head * q_h + at * q_n + d[None, :], own[:, None] & (d < D)[None, :], UP)
        mask = Mask + sample * m_b + head * m_h + at * m_r
        logits = logits_of(q, k, key, keys, k_n, mask, m_n, own, scale, d, D, MASK, PRECISION, UP)
        total = tl.load(Mass + pair * rows + row, mask=own, other=float("inf"))
        # A row of nothing has -inf everywhere and +inf here: -inf again, and no NaN.
        probs = tl.exp2(logits - total[:, None])
        if VOTES:
            probs *= tl.load(Votes + sample * rows + row, mask=own, other=0.0)[:, None]
        if OTHERS:
            probs = tl.where(row[:, None] == key[None, :], 0.0, probs)
        received += tl.sum(probs, 0)
    tl.store(Out + pair * keys + key, received.to(Out.dtype.element_ty), mask=key < keys)


def launch(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    votes: Tensor | None,
    scale: float,
    others: bool,
    *,
    run: Runner = plain,
) -> Tensor:
    """Run both kernels; arguments as :func:`tokcc.kernels.attention_columns.attention_columns`."""
    batch, heads, rows, width = query.shape
    keys = key.shape[2]
    query, key = row_major(query), row_major(key)
    mass = torch.empty([batch, heads, rows], dtype=torch.float32, device=query.device)
    out = torch.empty([batch, heads, keys], dtype=query.dtype, device=query.device)
    spread = None if mask is None else mask.expand(batch, heads, rows, keys)
    counted = mass if votes is None else votes.float().contiguous()  # a pointer that is not read
    wide = max(64, pow2(width))
    row, arch = f"{kind(query.dtype)} {wide}", arch_of(query.device)
    read = (query, key, query if spread is None else spread)
    sizes = (
        rows,
        keys,
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        *((0, 0, 0, 0) if spread is None else spread.stride()),
        scale * _LOG2E,
    )
    constants = {
        "D": width,
        "DP": max(16, pow2(width)),
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "PRECISION": precision(query.dtype, wide),
        "UP": interpreted(),
    }
    config = choose(_OP, "row_masses", arch, row)
    tile = config.tile["BR"]
    grid = ((rows + tile - 1) // tile * batch * heads,)
    run(_row_masses)[grid](*read, mass, *sizes, **constants, **config.options())
    config = choose(_OP, "columns", arch, row)
    tile = config.tile["BN"]
    grid = ((keys + tile - 1) // tile * batch * heads,)
    run(_columns)[grid](
        *read, counted, mass, out, *sizes, VOTES=votes is not None, OTHERS=others, **constants, **config.options()
    )
    return out


@torch.library.triton_op("tokcc::attention_columns_triton", mutates_args=())
def attention_columns_triton(
    query: Tensor, key: Tensor, mask: Tensor | None, votes: Tensor | None, scale: float, others: bool
) -> Tensor:
    """Launch the kernels where Inductor can see them."""
    return launch(query, key, mask, votes, scale, others, run=torch.library.wrap_triton)


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    kernels = (_row_masses, _columns)
    return [_case(kernel, dtype, width) for kernel in kernels for dtype in (half, "fp32") for width in (64, 128, 256)]


def _case(kernel: object, dtype: str, width: int) -> Case:
    strides = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n")
    single = dtype == "fp32" and width > 128
    tiles = ((16, 8, 1),) if single else ((64, 4, 2), (32, 4, 2), (16, 4, 2))
    types = {
        **dict.fromkeys(("Q", "K"), f"*{dtype}"),
        "Mask": "*i1",
        "Mass": "*fp32",
        **dict.fromkeys(("rows", "keys", "heads", *strides, "m_b", "m_h", "m_r", "m_n"), "i32"),
        "scale": "fp32",
    }
    constants = {
        "D": width,
        "DP": width,
        "MASK": 1,
        "PRECISION": precision(dtype_of(dtype), width),
        "UP": False,
    }
    if kernel is _columns:
        types |= {"Votes": "*fp32", "Out": f"*{dtype}"}
        constants |= {"VOTES": True, "OTHERS": True}
    return Case(
        kernel=kernel,
        row=f"{kind(dtype_of(dtype))} {width}",
        types=types,
        constants=constants,
        candidates=tuple(Config({"BR": 16, "BN": keys}, warps, stages) for keys, warps, stages in tiles),
        multiples_of_16=frozenset(strides),
    )
