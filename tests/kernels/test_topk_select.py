"""``tokcc::topk_select`` against a sort in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import topk_select

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32]


def brute_force(score: Tensor, k: int, ascending: bool) -> Tensor:
    rows = []
    for row in score.double().tolist():
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        rows.append(sorted(best) if ascending else best)
    return torch.tensor(rows, dtype=torch.int64).reshape(len(score), k)


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, int]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    # Few values: ties are the rule.
    flat = draw(st.lists(st.integers(-2, 2), min_size=batch * tokens, max_size=batch * tokens))
    return torch.tensor(flat).reshape(batch, tokens), draw(st.integers(1, tokens))


@given(scores(), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(case: tuple[Tensor, int], dtype: torch.dtype, ascending: bool) -> None:
    score, k = case
    found = topk_select(score.to(dtype), k, ascending)
    assert found.dtype == torch.int64
    assert found.is_contiguous()
    torch.testing.assert_close(found, brute_force(score, k, ascending), rtol=0, atol=0)


def test_minus_infinity_and_equal_scores() -> None:
    score = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, 0.0]])
    assert topk_select(score, 4, False).tolist() == [[1, 3, 4, 0]]
    assert topk_select(torch.zeros(1, 5), 3, False).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7])
def test_opcheck(dtype: torch.dtype, k: int) -> None:
    torch.library.opcheck(topk_select, (torch.arange(14).reshape(2, 7).to(dtype), k, True))
