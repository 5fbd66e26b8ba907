"""``tokcc::scatter_tokens`` against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import gather_tokens, scatter_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    kept = draw(st.integers(1, tokens))
    tail = draw(st.lists(st.integers(1, 3), max_size=2))
    index = torch.tensor([draw(st.permutations(range(tokens)))[:kept] for _ in range(batch)])
    base = torch.arange(batch * tokens * torch.Size(tail).numel()).reshape(batch, tokens, *tail)
    return base, index, -1 - torch.arange(batch * kept * torch.Size(tail).numel()).reshape(batch, kept, *tail)


@given(cases(), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    base, index, values = (t if i == 1 else t.to(dtype) for i, t in enumerate(case))
    before = base.clone()
    expected = base.clone()
    for b, row in enumerate(index.tolist()):
        for k, i in enumerate(row):
            expected[b, i] = values[b, k]
    found = scatter_tokens(base, index, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(base, before, rtol=0, atol=0)
    if base.ndim == 3:
        torch.testing.assert_close(gather_tokens(found, index, 1, 0), values, rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, transposed: bool) -> None:
    base = torch.zeros(2, 5, 3, dtype=dtype)
    if transposed:
        base = torch.zeros(5, 2, 3, dtype=dtype).transpose(0, 1)
    torch.library.opcheck(scatter_tokens, (base, torch.tensor([[0, 4], [2, 1]]), torch.ones(2, 2, 3, dtype=dtype)))
