"""Triton kernel of ``tokcc::attention_probs``: one walk for the row's sum, one that writes; logits are never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose, dtype_of, kind
from tokcc.kernels.device import exp2_shift, load, logits_of, row_sums
from tokcc.kernels.gpu import Runner, arch_of, interpreted, plain, pow2, precision, row_major

__all__ = ["attention_probs_triton", "cases", "launch"]

_OP = "attention_probs"
_LOG2E = 1.4426950408889634


@triton.jit
def _rows(
    Q,
    K,
    Mask,
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
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
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
    shift = exp2_shift(peak)
    share = 1.0 / tl.where(mass > 0, mass, 1.0)  # a row that may attend to nothing is zero
    for start in range(0, keys, BN):
        key = start + tl.arange(0, BN)
        logits = logits_of(q, k, key, keys, k_n, mask, m_n, own, scale, d, D, MASK, PRECISION, UP)
        probs = tl.exp2(logits - shift[:, None]) * share[:, None]
        out = Out + (pair * rows + row[:, None]) * keys + key[None, :]
        tl.store(out, probs.to(Out.dtype.element_ty), mask=own[:, None] & (key < keys)[None, :])


def launch(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, *, run: Runner = plain) -> Tensor:
    """Run the kernel; arguments as :func:`tokcc.kernels.attention_probs.attention_probs`."""
    batch, heads, rows, width = query.shape
    keys = key.shape[2]
    query, key = row_major(query), row_major(key)
    out = torch.empty([batch, heads, rows, keys], dtype=query.dtype, device=query.device)
    spread = None if mask is None else mask.expand(batch, heads, rows, keys)
    form = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    wide = max(64, pow2(width))
    config = choose(_OP, "rows", arch_of(query.device), f"{kind(query.dtype)} {wide}")
    tile = config.tile["BR"]
    run(_rows)[((rows + tile - 1) // tile * batch * heads,)](
        query,
        key,
        query if spread is None else spread,  # a pointer that is not read
        out,
        rows,
        keys,
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        *((0, 0, 0, 0) if spread is None else spread.stride()),
        scale * _LOG2E,
        D=width,
        DP=max(16, pow2(width)),
        MASK=form,
        PRECISION=precision(query.dtype, wide),
        UP=interpreted(),
        **config.options(),
    )
    return out


@torch.library.triton_op("tokcc::attention_probs_triton", mutates_args=())
def attention_probs_triton(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Launch the kernel where Inductor can see it."""
    return launch(query, key, mask, scale, run=torch.library.wrap_triton)


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    return [_case(dtype, width) for dtype in (half, "fp32") for width in (64, 128, 256)]


def _case(dtype: str, width: int) -> Case:
    strides = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n")
    single = dtype == "fp32" and width > 128
    tiles = ((16, 8, 1),) if single else ((64, 4, 2), (32, 4, 2), (16, 4, 2))
    return Case(
        kernel=_rows,
        row=f"{kind(dtype_of(dtype))} {width}",
        types={
            **dict.fromkeys(("Q", "K", "Out"), f"*{dtype}"),
            "Mask": "*i1",
            **dict.fromkeys(("rows", "keys", "heads", *strides, "m_b", "m_h", "m_r", "m_n"), "i32"),
            "scale": "fp32",
        },
        constants={
            "D": width,
            "DP": width,
            "MASK": 1,
            "PRECISION": precision(dtype_of(dtype), width),
            "UP": False,
        },
        candidates=tuple(Config({"BR": 16, "BN": keys}, warps, stages) for keys, warps, stages in tiles),
        multiples_of_16=frozenset(strides),
    )
