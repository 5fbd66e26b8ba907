"""Triton kernel of ``tokcc::block_sparse_attention``: flash attention that walks lists of key blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose, dtype_of, kind
from tokcc.kernels.device import capped, exp2_shift, load
from tokcc.kernels.gpu import Runner, arch_of, interpreted, plain, pow2, precision, row_major

__all__ = ["block_sparse_attention_plugin", "block_sparse_attention_triton", "cases", "launch"]

_OP = "block_sparse_attention"
_LOG2E = 1.4426950408889634


@triton.jit
def _attend(
    Q,
    K,
    V,
    Index,
    Count,
    Valid,
    Bias,
    Out,
    rows,
    keys,
    heads,
    groups,
    lists,
    row_blocks,
    slots,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    valid_b,
    bias_b,
    bias_h,
    scale,
    cap,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    # A block may be several tiles, in either direction.
    parts_q: tl.constexpr = (BLOCK_Q + BQ - 1) // BQ
    parts_k: tl.constexpr = (BLOCK_K + BK - 1) // BK
    tiles = row_blocks * parts_q
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # under a causal mask the last rows have most to do: they start first
    sample = (program // tiles) // heads
    head = (program // tiles) % heads
    block = tile // parts_q
    inner = (tile % parts_q) * BQ + tl.arange(0, BQ)
    row = block * BLOCK_Q + inner
    own = (row < rows) & (inner < BLOCK_Q)
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)

    q_base = Q + sample.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q = load(q_base + row[:, None].to(tl.int64) * q_n + d[None, :], own[:, None] & (d < D)[None, :], UP)
    k_base = K + sample.to(tl.int64) * k_b + (head // groups).to(tl.int64) * k_h
    v_base = V + sample.to(tl.int64) * v_b + (head // groups).to(tl.int64) * v_h
    bias_base = Bias + sample.to(tl.int64) * bias_b + (head // groups).to(tl.int64) * bias_h
    of_list = (sample * lists + head * lists // heads).to(tl.int64) * row_blocks + block
    total = tl.load(Count + of_list).to(tl.int32) * parts_k

    peak = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, DVP], tl.float32)
    for step in range(0, total):
        start = tl.load(Index + of_list * slots + step // parts_k).to(tl.int32) * BLOCK_K
        inside = (step % parts_k) * BK + tl.arange(0, BK)
        key = start + inside
        real = (key < keys) & (inside < BLOCK_K)
        at = key[:, None].to(tl.int64)
        k = load(k_base + at * k_n + d[None, :], real[:, None] & (d < D)[None, :], UP)
        v = load(v_base + at * v_n + dv[None, :], real[:, None] & (dv < DV)[None, :], UP)
        if HAS_VALID:
            real = real & (tl.load(Valid + sample.to(tl.int64) * valid_b + key, mask=real, other=0) != 0)
        seen = own[:, None] & real[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None] + (keys - rows))
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # to the base 2
        if CAPPED:
            logits = capped(logits, cap)
        if BIASED:
            bias = tl.load(bias_base + key, mask=(key < keys) & (inside < BLOCK_K), other=0.0)
            logits += bias.to(tl.float32)[None, :] * 1.4426950408889634
        logits = tl.where(seen, logits, float("-inf"))
        raised = tl.maximum(peak, tl.max(logits, 1))
        shift = exp2_shift(raised)
        probs = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        mass = mass * fade + tl.sum(probs, 1)
        acc = acc * fade[:, None] + tl.dot(probs.to(v.dtype), v, input_precision=PRECISION)
        peak = raised
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]  # a row that saw nothing is zero
    out = Out + ((sample.to(tl.int64) * heads + head) * rows + row[:, None]) * DV + dv[None, :]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=own[:, None] & (dv < DV)[None, :])


@triton.jit
def block_sparse_attention_plugin(
    Q,
    K,
    V,
    Index,
    Count,
    Valid,
    rows,
    stored,
    keys,
    heads,
    groups,
    lists,
    row_blocks,
    slots,
    Out,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """The kernel for contiguous tensors, its arguments in the order of a TensorRT plugin: inputs, sizes, outputs."""
    q_h = tl.cast(rows, tl.int64) * D
    k_h = tl.cast(stored, tl.int64) * D
    v_h = tl.cast(stored, tl.int64) * DV
    kv_heads = heads // groups
    _attend(
        Q, K, V, Index, Count, Valid, Q, Out, rows, keys, heads, groups, lists, row_blocks, slots,
        q_h * heads, q_h, D, k_h * kv_heads, k_h, D, v_h * kv_heads, v_h, DV, keys, 0, 0, SCALE, CAP,
        BLOCK_Q, BLOCK_K, BQ, BK, D, DV, DP, DVP, CAUSAL, HAS_VALID, CAPPED, False, PRECISION, UP,
    )  # fmt: skip


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    *,
    run: Runner = plain,
    config: Config | None = None,
) -> Tensor:
    """Run the kernel; arguments as :func:`tokcc.kernels.block_sparse_attention.block_sparse_attention`.

    Args:
        query: See there, as for all that follow.
        key: As above.
        value: As above.
        index: As above.
        count: As above.
        block_q: As above.
        block_k: As above.
        causal: As above.
        scale: As above.
        valid: As above.
        softcap: As above.
        bias: As above.
        run: What makes the kernel launchable.
        config: Another configuration than the table's.
    """
    batch, heads, rows, width = query.shape
    kv_heads, out_width = key.shape[1], value.shape[3]
    keys = key.shape[2] if valid is None else valid.shape[1]
    query, key, value = row_major(query), row_major(key), row_major(value)
    index, count = index.contiguous(), count.contiguous()
    mask = None if valid is None else row_major(valid)
    added = None if bias is None else row_major(bias)
    out = torch.empty([batch, heads, rows, out_width], dtype=query.dtype, device=query.device)
    wide = max(64, pow2(max(width, out_width)))
    if config is None:
        config = configuration(query.dtype, wide, block_q, block_k, arch_of(query.device))
    tiles = index.shape[2] * -(-block_q // config.tile["BQ"])
    run(_attend)[(tiles * batch * heads,)](
        query,
        key,
        value,
        index,
        count,
        query if mask is None else mask,  # a pointer that is not read
        query if added is None else added,
        out,
        rows,
        keys,
        heads,
        heads // kv_heads,
        index.shape[1],
        index.shape[2],
        index.shape[3],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        0 if mask is None else mask.stride(0),
        *((0, 0) if added is None else added.stride()[:2]),
        scale / softcap if softcap else scale * _LOG2E,
        softcap * _LOG2E,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        D=width,
        DV=out_width,
        DP=max(16, pow2(width)),
        DVP=max(16, pow2(out_width)),
        CAUSAL=causal,
        HAS_VALID=mask is not None,
        CAPPED=softcap != 0.0,
        BIASED=added is not None,
        PRECISION=precision(query.dtype, wide),
        UP=interpreted(),
        **config.options(),
    )
    return out


def configuration(dtype: torch.dtype, wide: int, block_q: int, block_k: int, arch: int) -> Config:
    """Return the configuration of the table for a call: the first whose tiles fill the blocks."""
    name = f"{kind(dtype)} {wide}"
    return choose(_OP, "attend", arch, name, lambda tile: block_q % tile["BQ"] == 0 and block_k % tile["BK"] == 0)


@torch.library.triton_op("tokcc::block_sparse_attention_triton", mutates_args=())
def block_sparse_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Launch the kernel where Inductor can see it."""
    return launch(
        query, key, value, index, count, block_q, block_k, causal, scale, valid, softcap, bias,
        run=torch.library.wrap_triton,
    )  # fmt: skip


# BQ, BK, warps, stages, in order of preference. Products of fp32 numbers are three of TF32 and need the registers.
_TILES = {
    ("half", 64): ((128, 64, 8, 3), (64, 64, 4, 3), (32, 32, 4, 2)),
    ("half", 128): ((128, 64, 8, 3), (64, 64, 4, 3), (32, 32, 4, 2)),
    ("half", 256): ((64, 64, 8, 2), (64, 32, 8, 2)),
    ("fp32", 64): ((64, 32, 4, 2),),
    ("fp32", 128): ((32, 16, 4, 2),),
    ("fp32", 256): ((16, 16, 8, 1),),
}
_LAST = (16, 16, 4, 1)  # fits any block


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    return [_case(dtype, width) for dtype in (half, "fp32") for width in (64, 128, 256)]


def _case(dtype: str, width: int) -> Case:
    pointers = {
        "Q": dtype,
        "K": dtype,
        "V": dtype,
        "Index": "i32",
        "Count": "i32",
        "Valid": "i1",
        "Bias": dtype,
        "Out": dtype,
    }
    ints = ("rows", "keys", "heads", "groups", "lists", "row_blocks", "slots")
    strides = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "valid_b", "bias_b", "bias_h")
    tiles = (*_TILES[kind(dtype_of(dtype)), width], _LAST)
    return Case(
        kernel=_attend,
        row=f"{kind(dtype_of(dtype))} {width}",
        types={
            **{name: f"*{kind}" for name, kind in pointers.items()},
            **dict.fromkeys((*ints, *strides), "i32"),
            "scale": "fp32",
            "cap": "fp32",
        },
        constants={
            "BLOCK_Q": 128,
            "BLOCK_K": 128,
            "D": width,
            "DV": width,
            "DP": width,
            "DVP": width,
            "CAUSAL": True,
            "HAS_VALID": False,
            "CAPPED": False,
            "BIASED": False,
            "PRECISION": precision(dtype_of(dtype), width),
            "UP": False,
        },
        candidates=tuple(Config({"BQ": bq, "BK": bk}, warps, stages) for bq, bk, warps, stages in tiles),
        multiples_of_16=frozenset(strides),
    )
