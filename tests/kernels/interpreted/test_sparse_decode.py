"""The decode kernels against a brute force, head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokcc.kernels.sparse_decode.reference import reference
from tokcc.kernels.sparse_decode.triton import launch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def slowly(*cases: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    page: int,
    scale: float,
    valid: Any,
    softcap: float,
) -> Tensor:
    batch, heads = query.shape[:2]
    out = torch.zeros(batch, heads, 1, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            own, of = h * key.shape[1] // heads, h * index.shape[1] // heads
            pages = set(index[b, of, : int(count[b, of])].tolist())
            seen = [j for j in range(key.shape[2]) if j // page in pages and (valid is None or valid[b, j])]
            if seen:
                logits = key[b, own, seen].double() @ query[b, h, 0].double() * scale
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                weights = torch.softmax(logits, 0)
                out[b, h, 0] = weights @ value[b, own, seen].double()
    return out


def check(
    keys: int,
    slots: int,
    page: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    lists: int = 2,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    padded: int = 0,
    parts: int | None = None,
    empty: bool = False,
    softcap: float = 0.0,
) -> None:
    g = torch.Generator().manual_seed(keys + slots)
    batch, pages = 2, -(-keys // page)
    query = torch.randn(batch, heads, 1, width, generator=g).to(dtype)
    key, value = (torch.randn(batch, kv_heads, keys, width, generator=g).to(dtype) for _ in range(2))
    index = torch.stack([torch.randperm(pages, generator=g)[:slots] for _ in range(batch * lists)]).int()
    count = torch.randint(1, slots + 1, (batch * lists,), generator=g).int()
    count[0], count[-1] = 1, slots
    if empty:
        count[0] = 0
    for row, n in zip(index, count.tolist(), strict=True):
        row[n:] = row[max(n - 1, 0)].clone()
    valid = None
    if padded:
        valid = torch.ones(batch, keys, dtype=torch.bool)
        valid[1, :padded] = False
    args = (
        query,
        key,
        value,
        index.reshape(batch, lists, slots),
        count.reshape(batch, lists),
        page,
        0.25,
        valid,
        softcap,
    )
    expected = brute_force(*args)
    for found in (launch(*args, parts=parts), reference(*args)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("keys", "slots", "page"),
    [
        (1, 1, 1),
        (163, 100, 1),
        (163, 5, 16),
        *slowly((31, 31, 1), (33, 20, 1), (1, 1, 16), (163, 11, 16), (100, 7, 13)),
    ],
)
@pytest.mark.parametrize("parts", [3, *slowly((1,), (None,))])
def test_lengths_and_parts(keys: int, slots: int, page: int, parts: int | None) -> None:
    check(keys, slots, page, parts=parts)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lists"), [(4, 2, 2), *slowly((4, 4, 1), (4, 1, 4), (4, 1, 1), (4, 2, 4), (20, 1, 1))]
)
def test_heads_and_dtypes(dtype: torch.dtype, heads: int, kv_heads: int, lists: int) -> None:
    check(70, 9, 4, heads, kv_heads, lists, dtype=dtype)


@pytest.mark.parametrize("width", [80, *slowly((8,), (64,), (96,), (128,), (256,))])
def test_widths(width: int) -> None:
    check(70, 20, width=width)


def test_padding_and_empty_lists() -> None:
    check(70, 5, 8, padded=40)
    check(70, 5, 8, lists=1, padded=69)
    check(70, 5, 8, lists=4, empty=True)


def test_capped_logits() -> None:
    check(70, 20, softcap=0.7)
