"""Triton kernel of ``tokcc::topk_select``: radix selection of the k-th largest, then compaction by position.

A row's scores are turned into unsigned integers of the same order. Four histograms of eight bits find the k-th largest;
one more walk writes the positions above it, and of those equal to it as many as are left, lower positions first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import DTYPES, Config, choose, dtype_of, kind
from tokcc.kernels.gpu import Runner, arch_of, plain, row_major
from tokcc.kernels.topk_select.reference import reference

__all__ = ["cases", "largest", "launch", "topk_select_triton"]

_OP = "topk_select"


@triton.jit
def _ordered(score, mask):
    """Load scores as uint32 of the same order: NaN above all, both zeros equal."""
    x = tl.load(score, mask=mask).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    flipped = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    # All bits set, as the type of the rest: a wider constant would make uint64 of it.
    return tl.where(x != x, bits | 0xFFFFFFFF, flipped).to(tl.uint32)


@triton.jit
def _select(Score, Index, tokens, k, stride, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores = Score + row * stride
    digits = tl.arange(0, 256)
    prefix = tl.zeros([], tl.uint32)
    left = k
    for step in tl.static_range(0, 4):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, tokens, BN):
            token = start + tl.arange(0, BN)
            key = _ordered(scores + token, token < tokens)
            among = token < tokens
            if step > 0:
                among = among & ((key >> (32 - 8 * step)) == prefix)
            digit = ((key >> (24 - 8 * step)) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=among)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # how many have a higher digit
        chosen = tl.sum((above >= left).to(tl.int32), 0)
        left = left - tl.sum(tl.where(digits == chosen, above, 0), 0)
        prefix = (prefix << 8) | chosen.to(tl.uint32)

    written = 0
    equals = 0
    for start in range(0, tokens, BN):
        token = start + tl.arange(0, BN)
        real = token < tokens
        key = _ordered(scores + token, real)
        equal = ((key == prefix) & real).to(tl.int32)
        in_turn = equals + tl.cumsum(equal, 0)
        taken = (((key > prefix) & real) | ((equal > 0) & (in_turn <= left))).to(tl.int32)
        place = written + tl.cumsum(taken, 0) - 1
        tl.store(Index + row * k + place, token.to(tl.int64), mask=taken > 0)
        written += tl.sum(taken, 0)
        equals += tl.sum(equal, 0)


def largest(score: Tensor, k: int, run: Runner) -> Tensor:
    """Return the positions of the k largest of each row ``[B, N]``, int64 ``[B, k]`` ascending."""
    score = row_major(score)
    index = torch.empty([score.shape[0], k], dtype=torch.int64, device=score.device)
    config = choose(_OP, "select", arch_of(score.device), kind(score.dtype))
    run(_select)[(score.shape[0],)](score, index, score.shape[1], k, score.stride(0), **config.options())
    return index


def launch(score: Tensor, k: int, ascending: bool, *, run: Runner = plain) -> Tensor:
    """Run the kernel; arguments as :func:`tokcc.kernels.topk_select.topk_select`.

    Types with more bits than fp32 go to the reference.
    """
    if score.dtype not in DTYPES:
        return reference(score, k, ascending)
    index = largest(score, k, run)
    if ascending:
        return index
    # Stable, and positions ascend: equal scores stay in the order of their positions.
    order = torch.sort(score.gather(1, index), dim=-1, descending=True, stable=True).indices
    return index.gather(1, order)


@torch.library.triton_op("tokcc::topk_select_triton", mutates_args=())
def topk_select_triton(score: Tensor, k: int, ascending: bool) -> Tensor:
    """Launch the kernel where Inductor can see it."""
    return launch(score, k, ascending, run=torch.library.wrap_triton)


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    return [
        Case(
            kernel=_select,
            row=kind(dtype_of(dtype)),
            types={"Score": f"*{dtype}", "Index": "*i64", **dict.fromkeys(("tokens", "k", "stride"), "i32")},
            constants={},
            candidates=tuple(Config({"BN": width}, warps, 1) for width, warps in ((1024, 4),)),
            multiples_of_16=frozenset(("stride",)),
        )
        for dtype in (half, "fp32")
    ]
