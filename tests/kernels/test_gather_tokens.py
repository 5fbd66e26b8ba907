"""``tokcc::gather_tokens`` against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import gather_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64]


def brute_force(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    samples = []
    for b, row in enumerate(index.tolist()):
        own = x.select(batch_dim, b if x.shape[batch_dim] > 1 else 0).unsqueeze(batch_dim)
        samples.append(torch.cat([own.narrow(dim, i, 1) for i in row], dim))
    return torch.cat(samples, batch_dim)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    rank = draw(st.integers(2, 4))
    dim, batch_dim = draw(st.permutations(range(rank)))[:2]
    batch, tokens, kept = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[dim], shape[batch_dim] = tokens, draw(st.sampled_from([1, batch]))
    index = draw(st.lists(st.integers(0, tokens - 1), min_size=batch * kept, max_size=batch * kept))
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return x, torch.tensor(index).reshape(batch, kept), dim, batch_dim


@given(cases(), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=80, deadline=None)
def test_equals_brute_force(case: tuple[Tensor, Tensor, int, int], dtype: torch.dtype, negative: bool) -> None:
    x, index, dim, batch_dim = case
    x = (x % 2).bool() if dtype is torch.bool else x.to(dtype)
    own = (dim - x.ndim, batch_dim - x.ndim) if negative else (dim, batch_dim)
    found = gather_tokens(x, index, *own)
    assert found.is_contiguous()
    torch.testing.assert_close(found, brute_force(x, index, dim, batch_dim), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "batch_dim"), [(1, 0), (0, 1), (2, 0), (-1, 0)])
@pytest.mark.parametrize("batch", [1, 3])
def test_opcheck(dtype: torch.dtype, dim: int, batch_dim: int, batch: int) -> None:
    shape = [4, 4, 4]
    shape[batch_dim] = batch
    x = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    torch.library.opcheck(gather_tokens, (x, torch.tensor([[0, 2, 3]] * 3), dim, batch_dim))
