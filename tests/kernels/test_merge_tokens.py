"""``tokcc::merge_tokens`` against the formula, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import merge_tokens

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Merge:
    x: Tensor
    weight: Tensor | None
    keep: Tensor
    source: Tensor
    slot: Tensor
    first: int

    def to(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, int, bool]:
        weight = None if self.weight is None else self.weight.to(dtype)
        padded = weight is not None and not bool(weight.all())
        return self.x.to(dtype), weight, self.keep, self.source, self.slot, self.first, padded


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    kept = draw(st.integers(1, tokens))
    gone = draw(st.integers(0, tokens - kept))
    first = draw(st.integers(0, kept - 1))
    order = torch.tensor([draw(st.permutations(range(tokens))) for _ in range(batch)])
    # One slot behind the last joins nothing.
    slot = [draw(st.lists(st.integers(0, kept - first), min_size=gone, max_size=gone)) for _ in range(batch)]
    weight = None
    if draw(st.booleans()):
        sizes = [draw(st.lists(st.integers(0, 4), min_size=tokens, max_size=tokens)) for _ in range(batch)]
        weight = torch.tensor(sizes).float()
    seed = draw(st.integers(0, 99))
    x = torch.randn(batch, tokens, draw(st.integers(1, 5)), generator=torch.Generator().manual_seed(seed))
    return Merge(
        x,
        weight,
        order[:, :kept],
        order[:, kept : kept + gone],
        torch.tensor(slot, dtype=torch.int64).reshape(batch, gone),
        first,
    )


def brute_force(m: Merge) -> tuple[Tensor, Tensor]:
    """``x'_k = sum w_i x_i / sum w_i`` over the kept token and what joins it."""
    batch, kept = m.keep.shape
    weight = torch.ones(m.x.shape[:2]) if m.weight is None else m.weight
    merged, total = torch.zeros(batch, kept, m.x.shape[2]), torch.zeros(batch, kept)
    for b in range(batch):
        for k in range(kept):
            group = [int(m.keep[b, k])]
            group += [int(i) for i, slot in zip(m.source[b], m.slot[b], strict=True) if int(slot) + m.first == k]
            total[b, k] = sum(float(weight[b, i]) for i in group)
            if total[b, k]:
                merged[b, k] = sum(weight[b, i] * m.x[b, i] for i in group) / total[b, k]
    return merged, total


@given(merges(), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=100, deadline=None)
def test_equals_brute_force(case: Merge, dtype: torch.dtype) -> None:
    merged, total = merge_tokens(*case.to(dtype))
    expected, weights = brute_force(case)
    assert merged.dtype == total.dtype == dtype
    assert merged.isfinite().all()
    torch.testing.assert_close(total.float(), weights, rtol=0, atol=0)
    tolerance = 5 * TOLERANCE[dtype]
    real = weights > 0
    torch.testing.assert_close(merged.float()[real], expected[real], rtol=tolerance, atol=tolerance)


def test_a_slot_of_padding_only_stays_finite() -> None:
    x = torch.randn(1, 4, 2)
    merged, total = merge_tokens(
        x, torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[0, 0]]), 1, True
    )
    assert merged.isfinite().all()
    assert total.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(2, 5, 3).to(dtype)
    weight = torch.ones(2, 5, dtype=dtype) if weighted else None
    keep, source = torch.tensor([[0, 2, 4], [0, 1, 2]]), torch.tensor([[1, 3], [3, 4]])
    torch.library.opcheck(merge_tokens, (x, weight, keep, source, torch.tensor([[0, 0], [1, 0]]), 1, False))
