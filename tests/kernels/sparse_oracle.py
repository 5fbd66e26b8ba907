"""Cases and a brute force of attention within lists, shared by the tests of its operation and of its kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lists:
    query: Tensor
    key: Tensor
    value: Tensor
    index: Tensor
    count: Tensor
    block_q: int
    block_k: int
    causal: bool
    scale: float
    valid: Tensor | None
    softcap: float
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Lists:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def call(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def lists(
    rows: int,
    keys: int,
    block_q: int,
    block_k: int,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    of_lists: int = 1,
    width: int = 16,
    out_width: int | None = None,
    causal: bool = True,
    few: bool = False,
    padded: int = 0,
    transposed: bool = False,
    softcap: float = 0.0,
    biased: bool = False,
) -> Lists:
    """Random tensors and lists that leave out some blocks; counts differ, padding repeats the last id.

    few: one block each. padded: keys of the second sample, from the left, that are padding.
    """
    g = torch.Generator().manual_seed(rows + 7 * keys + block_k)

    def random(*shape: int) -> Tensor:
        if not transposed:
            return torch.randn(*shape, generator=g)
        b, h, n, d = shape
        return torch.randn(b, n, h, d, generator=g).transpose(1, 2)

    row_blocks, blocks = -(-rows // block_q), -(-keys // block_k)
    slots = 1 if few else max(1, blocks - 1)
    index = torch.zeros(batch, of_lists, row_blocks, slots, dtype=torch.int32)
    count = torch.zeros(batch, of_lists, row_blocks, dtype=torch.int32)
    for b in range(batch):
        for h in range(of_lists):
            for m in range(row_blocks):
                # The block of the diagonal, and others; with few, any one.
                last = min((min((m + 1) * block_q, rows) - 1 + keys - rows) // block_k, blocks - 1)
                n = int(torch.randint(1, slots + 1, [], generator=g))
                others = [j for j in torch.randperm(blocks, generator=g).tolist() if j != last]
                ids = sorted([last, *others[: n - 1]])
                count[b, h, m] = n
                index[b, h, m] = torch.tensor(ids + ids[-1:] * (slots - n))
    valid = None
    if padded:
        valid = torch.ones(batch, keys, dtype=torch.bool)
        valid[-1, :padded] = False
    return Lists(
        random(batch, heads, rows, width),
        random(batch, kv_heads, keys, width),
        random(batch, kv_heads, keys, out_width or width),
        index,
        count,
        block_q,
        block_k,
        causal,
        width**-0.5,
        valid,
        softcap,
        torch.randn(batch, kv_heads, keys, generator=g) if biased else None,
    )


def brute_force(a: Lists) -> Tensor:
    """Each row on its own, in double precision."""
    q, k, v = a.query.double(), a.key.double(), a.value.double()
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    out = torch.zeros(batch, heads, rows, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            own, of = h * k.shape[1] // heads, h * a.index.shape[1] // heads
            for i in range(rows):
                m = i // a.block_q
                kept = {int(j) for j in a.index[b, of, m, : int(a.count[b, of, m])]}
                seen = [
                    j
                    for j in range(keys)
                    if j // a.block_k in kept
                    and (not a.causal or j <= i + keys - rows)
                    and (a.valid is None or bool(a.valid[b, j]))
                ]
                if seen:
                    logits = k[b, own, seen] @ q[b, h, i] * a.scale
                    logits = a.softcap * torch.tanh(logits / a.softcap) if a.softcap else logits
                    if a.bias is not None:
                        logits = logits + a.bias[b, own, seen].double()
                    weights = torch.softmax(logits, 0)
                    out[b, h, i] = weights @ v[b, own, seen]
    return out
