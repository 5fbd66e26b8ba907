"""The kernels that take, merge and choose tokens against the tests' own brute forces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels import test_attention_columns, test_gather_tokens, test_merge_tokens
from tests.kernels.test_merge_tokens import TOLERANCE, Merge
from tokcc.kernels.attention_columns.triton import launch as columns
from tokcc.kernels.attention_probs.reference import reference as attention_probs
from tokcc.kernels.attention_probs.triton import launch as probs
from tokcc.kernels.gather_slots.triton import launch as gather_slots
from tokcc.kernels.gather_tokens.triton import launch as gather
from tokcc.kernels.merge_tokens.triton import launch as merge
from tokcc.kernels.retain_slots.triton import launch as retain
from tokcc.kernels.topk_select.triton import launch as topk

HALVES = [torch.float32, torch.float16, torch.bfloat16]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.bool, *(pytest.param(dtype, marks=SLOW) for dtype in (torch.float32, torch.int64))]
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim", "batch_dim"),
    [((3, 9, 5), 1, 0), ((3, 2, 9, 300), 2, 0), ((9, 3), 0, 1), ((2, 9, 4, 3, 5), 1, 3), ((2, 1, 3, 9), -1, -2)],
)
def test_gather(shape: tuple[int, ...], dim: int, batch_dim: int, shared: bool, dtype: torch.dtype) -> None:
    sizes = list(shape)
    sizes[batch_dim] = 1 if shared else 3
    x = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    x = (x % 3 == 0) if dtype is torch.bool else (x % 251).to(dtype)
    index = torch.randint(0, 9, (3, 7), generator=torch.Generator().manual_seed(0))
    found = gather(x, index, dim, batch_dim)
    own, batch = dim % x.ndim, batch_dim % x.ndim
    assert torch.equal(found, test_gather_tokens.brute_force(x, index, own, batch))


def test_gather_views_and_slots() -> None:
    x = torch.randn(9, 2, 5).transpose(0, 1)
    index = torch.tensor([[8, 0, 0], [3, 4, 1]])
    assert torch.equal(gather(x, index, 1, 0), test_gather_tokens.brute_force(x, index, 1, 0))
    cache, slots = torch.randn(2, 3, 11, 6), torch.randint(0, 11, (2, 3, 4))
    expected = torch.stack(
        [torch.stack([c[s] for c, s in zip(a, b, strict=True)]) for a, b in zip(cache, slots, strict=True)]
    )
    assert torch.equal(gather_slots(cache, slots), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("kept", "gone", "channels", "first"),
    [(1, 0, 1, 0), (5, 3, 70, 1), pytest.param(16, 17, 64, 0, marks=SLOW), pytest.param(37, 40, 130, 3, marks=SLOW)],
)
def test_merge(kept: int, gone: int, channels: int, first: int, weighted: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(kept)
    tokens = kept + gone + 2
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(2)])
    weight = torch.randint(0, 5, (2, tokens), generator=g).float() if weighted else None
    # One slot behind the last joins nothing.
    slot = torch.randint(0, kept - first + 1, (2, gone), generator=g)
    x = torch.randn(2, tokens, channels, generator=g).to(dtype).float()
    case = Merge(x, weight, order[:, :kept], order[:, kept : kept + gone], slot, first)
    merged, total = merge(*case.to(dtype))
    expected, weights = test_merge_tokens.brute_force(case)
    torch.testing.assert_close(total.float(), weights, rtol=0, atol=0)
    tolerance = {torch.float32: 2e-6, **{half: TOLERANCE[half] for half in HALVES[1:]}}[dtype]
    torch.testing.assert_close(merged.float(), expected, rtol=tolerance, atol=tolerance)


def stable(score: Tensor, k: int) -> Tensor:
    """Python's sort is stable; NaN counts as the largest."""
    rows = [[(x == x, -x if x == x else 0.0) for x in row] for row in score.tolist()]
    return torch.tensor([sorted(range(len(row)), key=row.__getitem__)[:k] for row in rows])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("tokens", "k"),
    [(1, 1), (300, 7), *(pytest.param(*case, marks=SLOW) for case in ((9, 4), (255, 255), (3000, 1600)))],
)
@pytest.mark.parametrize("ties", [False, True])
def test_topk(tokens: int, k: int, ties: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(tokens)
    score = torch.randn(2, tokens, generator=g) if not ties else torch.randint(-2, 3, (2, tokens), generator=g) * 0.5
    score = score.to(dtype)
    expected = stable(score, k)
    assert torch.equal(topk(score, k, False), expected)
    assert torch.equal(topk(score, k, True), expected.sort(-1).values)
    assert torch.equal(retain(score[:, None], k)[:, 0], expected.sort(-1).values)


def test_topk_of_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    score = torch.tensor(
        [[0.0, -0.0, -inf, inf, nan, -1e-30, 1e-30, 0.0], [-inf] * 8, [-nan, 1, 2, 3, -3, -2, -1, inf]]
    )
    for k in (1, 2, 3, 5, 8):
        assert torch.equal(topk(score, k, True), stable(score, k).sort(-1).values)
    assert topk(torch.arange(5)[None], 2, False).tolist() == [[4, 3]]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "keys", "width"), [(1, 33, 64), *(pytest.param(*case, marks=SLOW) for case in ((1, 1, 8), (17, 70, 80)))]
)
@pytest.mark.parametrize("mask", ["rows", "bias", pytest.param("none", marks=SLOW), pytest.param("keys", marks=SLOW)])
def test_attention_rows(rows: int, keys: int, width: int, mask: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(keys)
    query, key = (torch.randn(2, n, 2, width, generator=g).to(dtype).transpose(1, 2) for n in (rows, keys))
    hidden = {
        "none": None,
        "keys": torch.rand(2, 1, 1, keys, generator=g) > 0.4,
        "rows": torch.rand(rows, keys, generator=g) > 0.9,
        "bias": torch.randn(1, 2, 1, keys, generator=g).to(dtype),
    }[mask]
    found = probs(query, key, hidden, 0.2)
    bias = hidden.double() if mask == "bias" and hidden is not None else hidden
    expected = attention_probs(query.double(), key.double(), bias, 0.2)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "keys", "width"), [(17, 33, 8), *(pytest.param(*case, marks=SLOW) for case in ((1, 1, 8), (70, 70, 80)))]
)
@pytest.mark.parametrize("form", ["rows", "bias", pytest.param("none", marks=SLOW), pytest.param("keys", marks=SLOW)])
@pytest.mark.parametrize("others", [False, True])
def test_columns(rows: int, keys: int, width: int, form: str, others: bool, dtype: torch.dtype) -> None:
    query, key, mask, votes = test_attention_columns.inputs(rows, keys, width, form)
    query, key = query.to(dtype), key.to(dtype)
    if form == "bias" and mask is not None:
        mask = mask.to(dtype)
    counted = votes if form == "rows" else None
    found = columns(query, key, mask, counted, 0.2, others)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected = test_attention_columns.brute_force(query.double(), key.double(), wide, counted, 0.2, others)
    tolerance = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
