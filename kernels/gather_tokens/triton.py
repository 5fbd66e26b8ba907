"""Triton kernel of ``tokcc::gather_tokens``: rows are copied once, in the order of the output."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcc.kernels.compile import Case
from tokcc.kernels.configs import Config, choose
from tokcc.kernels.gpu import Runner, arch_of, plain, pow2

__all__ = ["cases", "gather_tokens_triton", "launch", "take"]

_OP = "gather_tokens"
_COLUMNS = 256


@triton.jit
def _take(
    X,
    Index,
    Out,
    rows,
    columns,
    size_1,
    size_2,
    size_3,
    kept,
    x_0,
    x_1,
    x_2,
    x_3,
    TOKENS_LAST: tl.constexpr,
    CELLS: tl.constexpr,
    BC: tl.constexpr,
):
    # The output is [size_0, size_1, size_2, size_3, columns]; axes 1 and 3 are samples and tokens, or the reverse.
    BR: tl.constexpr = CELLS // BC
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    own = row < rows
    i_3 = row % size_3
    i_2 = row // size_3 % size_2
    i_1 = row // size_3 // size_2 % size_1
    i_0 = row // size_3 // size_2 // size_1
    if TOKENS_LAST:
        token = tl.load(Index + i_1 * kept + i_3, mask=own, other=0)
        at = i_0 * x_0 + i_1 * x_1 + i_2 * x_2 + token * x_3
    else:
        token = tl.load(Index + i_3 * kept + i_1, mask=own, other=0)
        at = i_0 * x_0 + token * x_1 + i_2 * x_2 + i_3 * x_3
    mask = own[:, None] & (column < columns)[None, :]
    x = tl.load(X + at[:, None] + column[None, :], mask=mask)
    tl.store(Out + row[:, None] * columns + column[None, :], x, mask=mask)


def take(x: Tensor, index: Tensor, dim: int, batch_dim: int, run: Runner) -> Tensor:
    """Gather along ``dim`` by sample; see :func:`tokcc.kernels.gather_tokens.gather_tokens`."""
    dim, batch_dim = dim % x.ndim, batch_dim % x.ndim
    batch, kept = index.shape
    shape = list(x.shape)
    shape[batch_dim], shape[dim] = batch, kept
    cells = x.contiguous()
    cells = cells.view(torch.uint8) if x.dtype == torch.bool else cells
    out = torch.empty(shape, dtype=cells.dtype, device=x.device)
    low, high = sorted((dim, batch_dim))
    columns = prod(shape[high + 1 :])
    middle = prod(shape[low + 1 : high])
    rows = prod(shape[: high + 1])
    strides = cells.stride()
    # One sample for all is read again by each.
    at_low, at_high = (
        0 if axis == batch_dim and _known(x.shape[axis]) and x.shape[axis] == 1 else strides[axis]
        for axis in (low, high)
    )
    config = choose(_OP, "take", arch_of(x.device), f"{8 * x.element_size()} bits")
    width = min(pow2(columns), _COLUMNS) if _known(columns) else _COLUMNS
    tile = config.tile["CELLS"] // width
    run(_take)[((rows + tile - 1) // tile, (columns + width - 1) // width)](
        cells,
        index.contiguous(),
        out,
        rows,
        columns,
        shape[low],
        middle,
        shape[high],
        kept,
        prod(x.shape[low:]),
        at_low,
        prod(x.shape[high:]),
        at_high,
        TOKENS_LAST=dim > batch_dim,
        BC=width,
        **config.options(),
    )
    return out.view(torch.bool) if x.dtype == torch.bool else out


def _known(size: object) -> bool:
    """Whether a size is a number and no symbol, of which nothing is assumed."""
    return isinstance(size, int)


def launch(x: Tensor, index: Tensor, dim: int, batch_dim: int, *, run: Runner = plain) -> Tensor:
    """Run the kernel; arguments as :func:`tokcc.kernels.gather_tokens.gather_tokens`."""
    return take(x, index, dim, batch_dim, run)


@torch.library.triton_op("tokcc::gather_tokens_triton", mutates_args=())
def gather_tokens_triton(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Launch the kernel where Inductor can see it."""
    return launch(x, index, dim, batch_dim, run=torch.library.wrap_triton)


def cases(half: str = "fp16") -> list[Case]:
    """Return what the table has a row for: the bits of a number, whatever they mean."""
    ints = ("rows", "columns", "size_1", "size_2", "size_3", "kept")
    strides = ("x_0", "x_1", "x_2", "x_3")
    return [
        Case(
            kernel=_take,
            row=f"{8 * size} bits",
            types={
                "X": f"*{kind}",
                "Index": "*i64",
                "Out": f"*{kind}",
                **dict.fromkeys((*ints, *strides), "i32"),
            },
            constants={"TOKENS_LAST": True, "BC": _COLUMNS},
            candidates=tuple(Config({"CELLS": cells}, 4, 1) for cells in (8192 // size,)),
            multiples_of_16=frozenset((*strides, "columns")),
        )
        for size, kind in ((1, "u8"), (2, half), (4, "fp32"), (8, "i64"))
    ]
