"""What ``gpu_check.py`` runs each kernel on: odd sizes for its results, large ones for its speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Check:
    """A kernel's inputs.

    Attributes:
        small: Inputs of odd sizes in a dtype, on the CPU.
        large: Inputs worth timing, on a device.
        moved: Bytes that the large call must read and write at least.
        by_score: The result is positions: equal, not close.
    """

    small: Callable[[torch.dtype], Args]
    large: Callable[[torch.device], Args]
    moved: Callable[[Args], int]
    by_score: bool = False


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def causal_lists(
    rows: int, keys: int, block: int, kept: int, heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return lists ``[1, heads, MQ, kept]``: the diagonal block and others of the past, evenly spread; and counts."""
    row_blocks, before = -(-rows // block), (keys - rows) // block
    index = torch.zeros(1, heads, row_blocks, kept, dtype=torch.int32)
    count = torch.zeros(1, heads, row_blocks, dtype=torch.int32)
    for head in range(heads):
        for m in range(row_blocks):
            own = min(before + m, -(-keys // block) - 1)
            n = min(kept, own + 1)
            past = torch.arange(n - 1) * own // max(n - 1, 1)  # ascending, unique, below the diagonal
            ids = torch.cat([past, torch.tensor([own])]).int()
            index[0, head, m, :n], index[0, head, m, n:], count[0, head, m] = ids, own, n
    return index.to(device), count.to(device)


def prefill(rows: int, width: int, kept: int, dtype: torch.dtype, device: torch.device, heads: int = 32) -> Args:
    """Return a causal call with 4 query heads to a key head and blocks of 128."""
    q = torch.randn(1, heads, rows, width, dtype=dtype, device=device)
    k, v = (torch.randn(1, heads // 4, rows, width, dtype=dtype, device=device) for _ in range(2))
    index, count = causal_lists(rows, rows, 128, kept, heads // 4, device)
    return q, k, v, index, count, 128, 128, True, width**-0.5


def _decode(keys: int, pages: int, dtype: torch.dtype, device: torch.device, heads: int, width: int) -> Args:
    q = torch.randn(2, heads, 1, width, dtype=dtype, device=device)
    k, v = (torch.randn(2, heads // 4, keys, width, dtype=dtype, device=device) for _ in range(2))
    index = torch.stack([torch.randperm(-(-keys // 16))[:pages].sort().values for _ in range(heads // 2)]).int()
    count = torch.full((2, heads // 4), pages, dtype=torch.int32, device=device)
    return q, k, v, index.reshape(2, heads // 4, pages).to(device), count, 16, width**-0.5


def _merge(tokens: int, gone: int, channels: int, batch: int, dtype: torch.dtype, device: torch.device) -> Args:
    x = torch.randn(batch, tokens, channels, dtype=dtype, device=device)
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)]).to(device)
    weight = torch.randint(1, 5, (batch, tokens), device=device).to(dtype)
    slot = torch.randint(0, tokens - gone, (batch, gone), device=device)
    return x, weight, order[:, gone:].contiguous(), order[:, :gone].contiguous(), slot, 0, False


def _gather(shape: tuple[int, ...], kept: int, dtype: torch.dtype, device: torch.device) -> Args:
    x = torch.randn(shape, dtype=dtype, device=device)
    return x, torch.randint(0, shape[1], (shape[0], kept), device=device), 1, 0


def _slots(shape: tuple[int, ...], kept: int, dtype: torch.dtype, device: torch.device) -> Args:
    x = torch.randn(shape, dtype=dtype, device=device)
    return x, torch.randint(0, shape[2], (*shape[:2], kept), device=device)


def _probs(rows: int, keys: int, width: int, dtype: torch.dtype, device: torch.device) -> Args:
    q, k = (torch.randn(2, 8, n, width, dtype=dtype, device=device) for n in (rows, keys))
    return q, k, None, width**-0.5


def _columns(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Args:
    q, k, _, scale = _probs(tokens, tokens, width, dtype, device)
    return q, k, torch.rand(2, 1, 1, tokens, device=device) > 0.1, None, scale, True


CPU = torch.device("cpu")
HALF = torch.bfloat16

CHECKS: Mapping[str, Check] = {
    "attention_columns": Check(
        lambda dtype: _columns(197, 80, dtype, CPU),
        lambda device: _columns(4096, 128, HALF, device),
        lambda a: _size(a[0], a[1]) + 2 * 8 * 4096 * 2,
    ),
    "attention_probs": Check(
        lambda dtype: _probs(5, 197, 80, dtype, CPU),
        lambda device: _probs(1, 8192, 128, HALF, device),
        lambda a: _size(a[0], a[1]) + 2 * 8 * 8192 * 2,
    ),
    "block_sparse_attention": Check(
        lambda dtype: prefill(643, 80, 3, dtype, CPU, heads=8),
        lambda device: prefill(8192, 128, 8, HALF, device),
        lambda a: _size(a[0], a[0], a[1], a[2]),
    ),
    "gather_slots": Check(
        lambda dtype: _slots((2, 3, 101, 80), 37, dtype, CPU),
        lambda device: _slots((4, 8, 8192, 128), 2048, HALF, device),
        lambda a: 2 * a[1].numel() * 128 * 2 + _size(a[1]),
    ),
    "gather_tokens": Check(
        lambda dtype: _gather((3, 197, 83), 61, dtype, CPU),
        lambda device: _gather((64, 577, 1024), 288, HALF, device),
        lambda a: 2 * a[1].numel() * 1024 * 2 + _size(a[1]),
    ),
    "merge_tokens": Check(
        lambda dtype: _merge(197, 43, 83, 3, dtype, CPU),
        lambda device: _merge(4096, 2048, 640, 8, HALF, device),
        lambda a: _size(a[0]) + 8 * 2048 * 640 * 2,
    ),
    "retain_slots": Check(
        lambda dtype: (torch.randn(2, 3, 1001).to(dtype), 333),
        lambda device: (torch.randn(4, 8, 16384, device=device), 8192),
        lambda a: _size(a[0]) + 4 * 8 * 8192 * 8,
        by_score=True,
    ),
    "sparse_decode": Check(
        lambda dtype: _decode(1003, 21, dtype, CPU, 8, 80),
        lambda device: _decode(32768, 128, HALF, device, 32, 128),
        lambda a: 2 * 2 * 8 * 128 * 16 * 128 * 2,
    ),
    "topk_select": Check(
        lambda dtype: (torch.randint(-9, 9, (3, 1001)).to(dtype), 333, False),
        lambda device: (torch.randn(64, 16384, device=device), 8192, True),
        lambda a: _size(a[0]) + 64 * 8192 * 8,
        by_score=True,
    ),
}
