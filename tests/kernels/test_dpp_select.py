"""``tokcc::dpp_select`` against determinants of every candidate set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tokcc.kernels import dpp_select


def brute_force(kernel: Tensor, k: int) -> list[list[int]]:
    """Add the token with which the determinant of the picked rows and columns is the largest."""
    result = []
    for table in kernel.double().numpy():
        picked: list[int] = []
        while len(picked) < k:
            left = [i for i in range(len(table)) if i not in picked]
            grown = {i: np.linalg.slogdet(table[np.ix_([*picked, i], [*picked, i])])[1] for i in left}
            picked.append(max(left, key=lambda i: grown[i]))
        result.append(sorted(picked))
    return result


def kernels(batch: int, tokens: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(batch, tokens, width, generator=generator), dim=-1)
    relevance = torch.rand(batch, tokens, 1, generator=generator) + 0.1
    return (x * relevance) @ (x * relevance).transpose(1, 2)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_equals_determinants(k: int, seed: int) -> None:
    kernel = kernels(2, 12, 16, seed)
    assert dpp_select(kernel, torch.zeros(2, 12), k).tolist() == brute_force(kernel, k)


def test_beyond_the_rank_come_the_lower_positions() -> None:
    """Rank 3: the picked tokens span all others, whose gains are rounding."""
    kernel = kernels(3, 10, 3, 5)
    three = dpp_select(kernel, torch.zeros(3, 10), 3)
    assert three.tolist() == brute_force(kernel, 3)
    six = dpp_select(kernel, torch.zeros(3, 10), 6)
    for few, more in zip(three.tolist(), six.tolist(), strict=True):
        assert more == sorted([*few, *[i for i in range(10) if i not in few][:3]])


def test_copies_come_last() -> None:
    kernel = kernels(1, 6, 8, 1)[:, [0, 0, 0, 1, 2, 3]][:, :, [0, 0, 0, 1, 2, 3]]
    assert dpp_select(kernel, torch.zeros(1, 6), 4).tolist() == [[0, 3, 4, 5]]


def test_what_must_not_be_picked_comes_last() -> None:
    kernel = kernels(1, 5, 8, 2)
    unary = torch.tensor([[0.0, -1e30, 0.0, -torch.inf, 0.0]])
    assert dpp_select(kernel, unary, 3).tolist() == [[0, 2, 4]]
    assert dpp_select(kernel, unary, 4).tolist() == [[0, 1, 2, 4]]
    assert dpp_select(kernel, unary, 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("k", [1, 5])
def test_opcheck(k: int) -> None:
    torch.library.opcheck(dpp_select, (kernels(2, 5, 8, 0), torch.zeros(2, 5), k))
