"""Triton kernel of ``kv_update``: rows of all samples and heads copied to their slots; nothing else is touched."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose, dtype_of, kind
from tokcc.kernels.gpu import Runner, arch_of, plain, pow2

__all__ = ["cases", "kv_update_plugin", "launch"]

_OP = "kv_update"


@triton.jit
def kv_update_plugin(
    Cache, New, Place, rows, count, slots, Out, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Arguments in the order of a TensorRT plugin: inputs, sizes, outputs. ``Out`` is ``Cache`` itself, written over.

    rows: those of all samples and heads, ``B * H * S``; count: S; slots: N.
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, DP)
    own = row < rows
    place = tl.load(Place + row % count, mask=own, other=-1)
    # A slot that the cache does not have is not written.
    inside = own & (place >= 0) & (place < slots)
    wide = inside[:, None] & (d < D)[None, :]
    entry = tl.load(New + row.to(tl.int64)[:, None] * D + d[None, :], mask=wide)
    at = (row // count).to(tl.int64) * slots + place
    tl.store(Out + at[:, None] * D + d[None, :], entry, mask=wide)


def launch(cache: Tensor, new: Tensor, place: Tensor, *, run: Runner = plain) -> Tensor:
    """Write new entries into their slots, in place.

    Args:
        cache: ``[B, H, N, D]``, contiguous.
        new: ``[B, H, S, D]`` in the same dtype.
        place: int64 ``[S]``: the slot of each new entry, no two the same; one that the cache does not have is left out.
        run: What makes the kernel launchable.

    Returns:
        The cache.
    """
    batch, heads, count, width = new.shape
    rows = batch * heads * count
    config = choose(_OP, "kv_update_plugin", arch_of(cache.device), kind(cache.dtype))
    tile = config.tile["BT"]
    if rows:
        run(kv_update_plugin)[((rows + tile - 1) // tile,)](
            cache,
            new.contiguous(),
            place.contiguous(),
            rows,
            count,
            cache.shape[2],
            cache,
            D=width,
            DP=pow2(width),
            **config.options(),
        )
    return cache


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for; with ``half="bf16"`` the same for that type."""
    return [
        Case(
            kernel=kv_update_plugin,
            row=kind(dtype_of(dtype)),
            types={
                **dict.fromkeys(("Cache", "New", "Out"), f"*{dtype}"),
                "Place": "*i64",
                **dict.fromkeys(("rows", "count", "slots"), "i32"),
            },
            constants={"D": 128, "DP": 128},
            candidates=(Config({"BT": 8}, 4, 1), Config({"BT": 1}, 1, 1)),
        )
        for dtype in (half, "fp32")
    ]
