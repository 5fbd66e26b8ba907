"""Triton kernels of ``tokcc::sparse_decode``: each part of a list on its own, then the parts together (split-K)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose, dtype_of, kind
from tokcc.kernels.device import capped, exp2_shift, load
from tokcc.kernels.gpu import Runner, arch_of, interpreted, multiprocessors, plain, pow2, precision, row_major

__all__ = ["cases", "launch", "sparse_decode_plugin", "sparse_decode_triton"]

_OP = "sparse_decode"
_LOG2E = 1.4426950408889634
_PARTS = 64
"""Parts of a list at most: the second kernel walks them one by one."""


@triton.jit
def _walk(
    Q,
    K,
    V,
    Index,
    Count,
    Valid,
    sample,
    first,
    part,
    keys,
    heads,
    kv_heads,
    lists,
    slots,
    length,
    q_b,
    q_h,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    valid_b,
    scale,
    cap,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """Return the largest logit to the base 2, the sum of the exponentials and the weighted sum of a part of a list."""
    inner = tl.arange(0, RP)
    own = inner < ROWS
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    q_base = Q + sample.to(tl.int64) * q_b + (first + inner)[:, None].to(tl.int64) * q_h
    q = load(q_base + d[None, :], own[:, None] & (d < D)[None, :], UP)
    kv_head = (first * kv_heads // heads).to(tl.int64)
    k_base = K + sample.to(tl.int64) * k_b + kv_head * k_h
    v_base = V + sample.to(tl.int64) * v_b + kv_head * v_h
    of_list = sample * lists + first * lists // heads
    entries = Index + of_list.to(tl.int64) * slots
    stop = tl.minimum((part + 1) * length, tl.load(Count + of_list).to(tl.int32) * PAGE)

    peak = tl.full([RP], float("-inf"), tl.float32)
    mass = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, DVP], tl.float32)
    for start in range(part * length, stop, BK):
        entry = start + tl.arange(0, BK)
        real = entry < stop
        token = tl.load(entries + entry // PAGE, mask=real, other=0).to(tl.int32) * PAGE + entry % PAGE
        real = real & (token < keys)
        at = token[:, None].to(tl.int64)
        k = load(k_base + at * k_n + d[None, :], real[:, None] & (d < D)[None, :], UP)
        v = load(v_base + at * v_n + dv[None, :], real[:, None] & (dv < DV)[None, :], UP)
        if HAS_VALID:
            real = real & (tl.load(Valid + sample.to(tl.int64) * valid_b + token, mask=real, other=0) != 0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # to the base 2
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where(real[None, :], logits, float("-inf"))
        raised = tl.maximum(peak, tl.max(logits, 1))
        shift = exp2_shift(raised)
        probs = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        mass = mass * fade + tl.sum(probs, 1)
        acc = acc * fade[:, None] + tl.dot(probs.to(v.dtype), v, input_precision=PRECISION)
        peak = raised
    return peak, mass, acc


@triton.jit
def _part(
    Q,
    K,
    V,
    Index,
    Count,
    Valid,
    Acc,
    Peak,
    Mass,
    keys,
    heads,
    kv_heads,
    lists,
    slots,
    parts,
    length,
    q_b,
    q_h,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    valid_b,
    scale,
    cap,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % parts
    group = (program // parts) % (heads // ROWS)
    sample = program // parts // (heads // ROWS)
    first = group * ROWS  # the query heads of a program share a list and a key head
    peak, mass, acc = _walk(
        Q, K, V, Index, Count, Valid, sample, first, part, keys, heads, kv_heads, lists, slots, length,
        q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n, valid_b, scale, cap,
        PAGE, ROWS, RP, BK, D, DV, DP, DVP, HAS_VALID, CAPPED, PRECISION, UP,
    )  # fmt: skip
    inner = tl.arange(0, RP)
    own = inner < ROWS
    dv = tl.arange(0, DVP)
    # A part behind the count says so with a peak of -inf; its sums are zero.
    row = (sample * heads + first + inner).to(tl.int64) * parts + part
    tl.store(Peak + row, peak, mask=own)
    tl.store(Mass + row, mass, mask=own)
    tl.store(Acc + row[:, None] * DV + dv[None, :], acc, mask=own[:, None] & (dv < DV)[None, :])


@triton.jit
def _join(Acc, Peak, Mass, Out, parts, DV: tl.constexpr, DVP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, DVP)
    peak = float("-inf")
    mass = 0.0
    acc = tl.zeros([DVP], tl.float32)
    for part in range(0, parts):
        at = row * parts + part
        own = tl.load(Peak + at)
        raised = tl.maximum(peak, own)
        shift = exp2_shift(raised)
        fade = tl.exp2(peak - shift)
        share = tl.exp2(own - shift)
        mass = mass * fade + tl.load(Mass + at) * share
        acc = acc * fade + tl.load(Acc + at * DV + dv, mask=dv < DV, other=0.0) * share
        peak = raised
    acc = acc / tl.where(mass > 0, mass, 1.0)  # a list of nothing gives zeros
    tl.store(Out + row * DV + dv, acc.to(Out.dtype.element_ty), mask=dv < DV)


@triton.jit
def sparse_decode_plugin(
    Q,
    K,
    V,
    Index,
    Count,
    Valid,
    keys,
    heads,
    kv_heads,
    lists,
    slots,
    Out,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    UP: tl.constexpr,
):
    """One kernel for contiguous tensors, in the argument order of a TensorRT plugin: a program walks a whole list."""
    program = tl.program_id(0)
    sample = program // (heads // ROWS)
    first = program % (heads // ROWS) * ROWS
    k_h = tl.cast(keys, tl.int64) * D
    v_h = tl.cast(keys, tl.int64) * DV
    _peak, mass, acc = _walk(
        Q, K, V, Index, Count, Valid, sample, first, 0, keys, heads, kv_heads, lists, slots, slots * PAGE,
        heads * D, D, k_h * kv_heads, k_h, D, v_h * kv_heads, v_h, DV, keys, SCALE, CAP,
        PAGE, ROWS, RP, BK, D, DV, DP, DVP, HAS_VALID, CAPPED, PRECISION, UP,
    )  # fmt: skip
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]  # a list of nothing gives zeros
    inner = tl.arange(0, RP)
    dv = tl.arange(0, DVP)
    row = (sample * heads + first + inner).to(tl.int64)
    own = (inner < ROWS)[:, None] & (dv < DV)[None, :]
    tl.store(Out + row[:, None] * DV + dv[None, :], acc.to(Out.dtype.element_ty), mask=own)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    page: int,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
    *,
    run: Runner = plain,
    parts: int | None = None,
) -> Tensor:
    """Run both kernels; arguments as :func:`tokcc.kernels.sparse_decode.sparse_decode`.

    Args:
        query: See there, as for all that follow.
        key: As above.
        value: As above.
        index: As above.
        count: As above.
        page: As above.
        scale: As above.
        valid: As above.
        softcap: As above.
        run: What makes a kernel launchable.
        parts: Another number of parts than the one that fills the device.
    """
    batch, heads, _, width = query.shape
    kv_heads, keys, out_width = key.shape[1], key.shape[2], value.shape[3]
    lists, slots = index.shape[1], index.shape[2]
    query, key, value = row_major(query), row_major(key), row_major(value)
    index, count = index.contiguous(), count.contiguous()
    mask = None if valid is None else row_major(valid)
    rows = heads // max(lists, kv_heads)
    wide = max(64, pow2(max(width, out_width)))
    config = choose(_OP, "part", arch_of(query.device), f"{kind(query.dtype)} {wide}")
    step = config.tile["BK"]
    tiles = (slots * page + step - 1) // step
    groups = batch * (heads // rows)
    if parts is None:
        parts = torch.sym_min((2 * multiprocessors(query.device) + groups - 1) // groups, _PARTS)
    parts = torch.sym_max(1, torch.sym_min(parts, tiles))
    length = (tiles + parts - 1) // parts * step
    device = query.device
    acc = torch.empty([batch, heads, parts, out_width], dtype=torch.float32, device=device)
    peak = torch.empty([batch, heads, parts], dtype=torch.float32, device=device)
    mass = torch.empty([batch, heads, parts], dtype=torch.float32, device=device)
    out = torch.empty([batch, heads, 1, out_width], dtype=query.dtype, device=device)
    run(_part)[(groups * parts,)](
        query,
        key,
        value,
        index,
        count,
        query if mask is None else mask,  # a pointer that is not read
        acc,
        peak,
        mass,
        keys,
        heads,
        kv_heads,
        lists,
        slots,
        parts,
        length,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        0 if mask is None else mask.stride(0),
        scale / softcap if softcap else scale * _LOG2E,
        softcap * _LOG2E,
        PAGE=page,
        ROWS=rows,
        RP=max(16, pow2(rows)),
        D=width,
        DV=out_width,
        DP=max(16, pow2(width)),
        DVP=max(16, pow2(out_width)),
        HAS_VALID=mask is not None,
        CAPPED=softcap != 0.0,
        PRECISION=precision(query.dtype, wide),
        UP=interpreted(),
        **config.options(),
    )
    run(_join)[(batch * heads,)](acc, peak, mass, out, parts, DV=out_width, DVP=max(16, pow2(out_width)), num_warps=4)
    return out


@torch.library.triton_op("tokcc::sparse_decode_triton", mutates_args=())
def sparse_decode_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    page: int,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Launch the kernels where Inductor can see them."""
    return launch(query, key, value, index, count, page, scale, valid, softcap, run=torch.library.wrap_triton)


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    parts = [_part_case(dtype, width) for dtype in (half, "fp32") for width in (64, 128, 256)]
    return parts + [_join_case(dtype) for dtype in (half, "fp32")]


def _part_case(dtype: str, width: int) -> Case:
    pointers = {"Q": dtype, "K": dtype, "V": dtype, "Index": "i32", "Count": "i32", "Valid": "i1"}
    sums = dict.fromkeys(("Acc", "Peak", "Mass"), "fp32")
    ints = ("keys", "heads", "kv_heads", "lists", "slots", "parts", "length")
    strides = ("q_b", "q_h", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "valid_b")
    tiles: tuple[tuple[int, int, int], ...] = ((64, 4, 3), (32, 4, 2))
    if dtype == "fp32":
        tiles = ((16, 8, 1),) if width > 128 else ((32, 4, 2), (16, 4, 2))
    return Case(
        kernel=_part,
        row=f"{kind(dtype_of(dtype))} {width}",
        types={
            **{name: f"*{kind}" for name, kind in {**pointers, **sums}.items()},
            **dict.fromkeys((*ints, *strides), "i32"),
            "scale": "fp32",
            "cap": "fp32",
        },
        constants={
            "PAGE": 16,
            "ROWS": 4,
            "RP": 16,
            "D": width,
            "DV": width,
            "DP": width,
            "DVP": width,
            "HAS_VALID": False,
            "CAPPED": False,
            "PRECISION": precision(dtype_of(dtype), width),
            "UP": False,
        },
        candidates=tuple(Config({"BK": step}, warps, stages) for step, warps, stages in tiles),
        multiples_of_16=frozenset((*strides, "length")),
    )


def _join_case(dtype: str) -> Case:
    return Case(
        kernel=_join,
        row=kind(dtype_of(dtype)),
        types={"Acc": "*fp32", "Peak": "*fp32", "Mass": "*fp32", "Out": f"*{dtype}", "parts": "i32"},
        constants={"DV": 128, "DVP": 128},
        candidates=(Config({}, 4, 3),),
    )
