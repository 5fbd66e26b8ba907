"""``tokcc::greedy_select`` against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import greedy_select


def brute_force(similarity: Tensor, unary: Tensor, first: Tensor, k: int, form: str = "nearest") -> list[list[int]]:
    def rated(own: float, row: list[float]) -> float:
        if form == "product":
            return own * (1 - max(row))
        return own - (sum(row) if form == "all" else max(row))

    result = []
    for s, u, f in zip(similarity.tolist(), unary.tolist(), first.tolist(), strict=True):
        picked: list[int] = []
        while len(picked) < k:
            left = [i for i in range(len(u)) if i not in picked]
            score = {i: rated(u[i], [s[p][i] for p in picked]) if picked else f[i] for i in left}
            picked.append(max(left, key=lambda i: (score[i], -i)))
        result.append(sorted(picked))
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 8))
    # Halves: exact in fp32, and full of ties.
    values = st.integers(-3, 3).map(lambda v: v / 2)

    def table(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).float().reshape(shape)

    half = table(batch, tokens, tokens)
    return half + half.transpose(1, 2), table(batch, tokens), table(batch, tokens), draw(st.integers(1, tokens))


@pytest.mark.parametrize("form", ["nearest", "all", "product"])
@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_equals_brute_force(form: str, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    similarity, unary, first, k = case
    if form == "product":
        unary = unary + 2
    assert greedy_select(similarity, unary, first, k, form).tolist() == brute_force(similarity, unary, first, k, form)


def test_what_must_not_be_picked_comes_last() -> None:
    """Padding at -1e30 is picked only when nothing else is left, and each token once."""
    unary = torch.tensor([[0.0, -1e30, 0.0, -1e30]])
    similarity = torch.ones(1, 4, 4)
    assert greedy_select(similarity, unary, unary, 2).tolist() == [[0, 2]]
    assert greedy_select(similarity, unary, unary, 3).tolist() == [[0, 1, 2]]
    assert greedy_select(similarity, unary, unary, 4).tolist() == [[0, 1, 2, 3]]


def test_minus_infinity_does_not_pick_a_token_twice() -> None:
    unary = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert greedy_select(torch.zeros(1, 3, 3), unary, unary, 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("k", [1, 5])
def test_opcheck(k: int) -> None:
    torch.library.opcheck(greedy_select, (torch.rand(2, 5, 5), torch.rand(2, 5), torch.rand(2, 5), k))
