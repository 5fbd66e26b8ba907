"""Triton kernel of ``tokcc::merge_tokens``: each token finds what joins it; no atomics, sources read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose, dtype_of, kind
from tokcc.kernels.gpu import Runner, arch_of, plain, row_major

__all__ = ["cases", "launch", "merge_tokens_plugin", "merge_tokens_triton"]

_OP = "merge_tokens"


@triton.jit
def _merge(
    X,
    Weight,
    Keep,
    Source,
    Slot,
    Out,
    Total,
    kept,
    gone,
    channels,
    first,
    x_b,
    x_n,
    w_b,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    tiles = tl.cdiv(kept, BT)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    target = tl.program_id(0) % tiles * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    own = target < kept
    wide = (channel < channels)[None, :]
    token = tl.load(Keep + sample * kept + target, mask=own, other=0)
    x = X + sample * x_b + channel[None, :]
    if WEIGHTED:
        weight = tl.load(Weight + sample * w_b + token, mask=own).to(tl.float32)
        total = tl.where(own, weight, 0.0)
    else:
        total = tl.where(own, 1.0, 0.0)
    row = tl.load(x + token[:, None] * x_n, mask=own[:, None] & wide).to(tl.float32)
    acc = tl.where(own[:, None] & wide, row, 0.0) * total[:, None]
    for start in range(0, gone, BR):
        entry = start + tl.arange(0, BR)
        real = entry < gone
        slot = tl.load(Slot + sample * gone + entry, mask=real, other=0) + first
        joins = (target[:, None] == slot[None, :]) & real[None, :] & own[:, None]  # [BT, BR]
        some = tl.max(joins.to(tl.int32), 0) > 0
        # Most tiles of sources have nothing for this tile of targets: theirs are not read.
        if tl.max(some.to(tl.int32), 0) > 0:
            source = tl.load(Source + sample * gone + entry, mask=some, other=0)
            moved = tl.load(x + source[:, None] * x_n, mask=some[:, None] & wide).to(tl.float32)
            moved = tl.where(some[:, None] & wide, moved, 0.0)
            if WEIGHTED:
                weight = tl.load(Weight + sample * w_b + source, mask=some).to(tl.float32)
                share = tl.where(joins, weight[None, :], 0.0)
            else:
                share = tl.where(joins, 1.0, 0.0)
            total += tl.sum(share, 1)
            acc += tl.dot(share, moved, input_precision="tf32x3")
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a slot of padding only holds zeros
    at = sample * kept + target
    tl.store(Out + at[:, None] * channels + channel[None, :], acc.to(Out.dtype.element_ty), mask=own[:, None] & wide)
    if tl.program_id(1) == 0:
        tl.store(Total + at, total.to(Total.dtype.element_ty), mask=own)


@triton.jit
def merge_tokens_plugin(
    X,
    Weight,
    Keep,
    Source,
    Slot,
    tokens,
    kept,
    gone,
    Out,
    Total,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The kernel for contiguous tensors, its arguments in the order of a TensorRT plugin: inputs, sizes, outputs."""
    x_b = tokens * CHANNELS
    _merge(
        X, Weight, Keep, Source, Slot, Out, Total, kept, gone, CHANNELS, FIRST, x_b, CHANNELS, tokens,
        WEIGHTED, BT, BR, BC,
    )  # fmt: skip


def launch(
    x: Tensor,
    weight: Tensor | None,
    keep: Tensor,
    source: Tensor,
    slot: Tensor,
    first: int,
    padded: bool,
    *,
    run: Runner = plain,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as :func:`tokcc.kernels.merge_tokens.merge_tokens`. ``padded`` changes nothing here."""
    batch, _, channels = x.shape
    kept, gone = keep.shape[1], source.shape[1]
    x = row_major(x)
    weights = None if weight is None else row_major(weight)
    out = torch.empty([batch, kept, channels], dtype=x.dtype, device=x.device)
    total = torch.empty([batch, kept], dtype=x.dtype, device=x.device)
    config = choose(_OP, "merge", arch_of(x.device), kind(x.dtype))
    tile, width = config.tile["BT"], config.tile["BC"]
    run(_merge)[(batch * ((kept + tile - 1) // tile), (channels + width - 1) // width)](
        x,
        x if weights is None else weights,  # a pointer that is not read
        keep.contiguous(),
        source.contiguous(),
        slot.contiguous(),
        out,
        total,
        kept,
        gone,
        channels,
        first,
        *x.stride()[:2],
        0 if weights is None else weights.stride(0),
        WEIGHTED=weights is not None,
        **config.options(),
    )
    return out, total


@torch.library.triton_op("tokcc::merge_tokens_triton", mutates_args=())
def merge_tokens_triton(
    x: Tensor, weight: Tensor | None, keep: Tensor, source: Tensor, slot: Tensor, first: int, padded: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel where Inductor can see it."""
    return launch(x, weight, keep, source, slot, first, padded, run=torch.library.wrap_triton)


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    return [
        Case(
            kernel=_merge,
            row=kind(dtype_of(dtype)),
            types={
                **dict.fromkeys(("X", "Weight", "Out", "Total"), f"*{dtype}"),
                **dict.fromkeys(("Keep", "Source", "Slot"), "*i64"),
                **dict.fromkeys(("kept", "gone", "channels", "first", "x_b", "x_n", "w_b"), "i32"),
            },
            constants={"WEIGHTED": True},
            candidates=tuple(Config({"BT": 16, "BR": 16, "BC": width}, warps, 1) for width, warps in ((64, 4),)),
            multiples_of_16=frozenset(("x_b", "x_n", "channels")),
        )
        for dtype in (half, "fp32")
    ]
