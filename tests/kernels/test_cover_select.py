"""``tokcc::cover_select`` against the objective itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import cover_select


def covered(table: list[list[float]], chosen: list[int]) -> float:
    return sum(max([0.0, *(row[i] for i in chosen)]) for row in table)


def brute_force(table: Tensor, k: int) -> list[list[int]]:
    """Add the token with which the rows are covered best."""
    result = []
    for rows in table.tolist():
        picked: list[int] = []
        while len(picked) < k:
            left = [i for i in range(len(rows[0])) if i not in picked]
            picked.append(max(left, key=lambda i: (covered(rows, [*picked, i]), -i)))
        result.append(sorted(picked))
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 8)))
    # Quarters: exact in fp32, and full of ties.
    values = st.integers(0, 4).map(lambda v: v / 4)
    count = torch.Size(shape).numel()
    table = torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).float().reshape(shape)
    return table, draw(st.integers(1, shape[2]))


@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_equals_brute_force(case: tuple[Tensor, int]) -> None:
    table, k = case
    unary = torch.zeros(table.shape[0], table.shape[2])
    assert cover_select(table, unary, k).tolist() == brute_force(table, k)


def test_what_must_not_be_picked_comes_last() -> None:
    table = torch.tensor([[[0.1, 0.9, 0.2, 0.8]]])
    unary = torch.tensor([[0.0, -1e30, 0.0, -torch.inf]])
    assert cover_select(table, unary, 2).tolist() == [[0, 2]]
    assert cover_select(table, unary, 3).tolist() == [[0, 1, 2]]
    assert cover_select(table, unary, 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("k", [1, 5])
def test_opcheck(k: int) -> None:
    torch.library.opcheck(cover_select, (torch.rand(2, 7, 5), torch.zeros(2, 5), k))
