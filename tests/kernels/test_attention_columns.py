"""``tokcc::attention_columns`` against sums over the brute force of its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_attention_probs import brute_force as rows_of
from tokcc.kernels import attention_columns

FORMS = ["none", "keys", "rows", "bias"]


def brute_force(
    query: Tensor, key: Tensor, mask: Tensor | None, votes: Tensor | None, scale: float, others: bool
) -> Tensor:
    probs = rows_of(query, key, mask, scale)
    batch, heads, rows, keys = probs.shape
    out = torch.zeros(batch, heads, keys, dtype=torch.float64)
    for b in range(batch):
        for r in range(rows):
            vote = 1.0 if votes is None else votes[b, r].item()
            for n in range(keys):
                if not (others and r == n):
                    out[b, :, n] += vote * probs[b, :, r, n]
    return out


def inputs(rows: int, keys: int, width: int, form: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(keys + rows)
    query, key = (torch.randn(2, n, 2, width, generator=g).transpose(1, 2) for n in (rows, keys))
    mask = {
        "none": None,
        "keys": torch.rand(2, 1, 1, keys, generator=g) > 0.4,
        "rows": torch.rand(rows, keys, generator=g) > 0.7,
        "bias": torch.randn(1, 2, 1, keys, generator=g),
    }[form]
    return query, key, mask, torch.randint(0, 3, (2, rows), generator=g).float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("voting", [False, True])
def test_column_sums(form: str, others: bool, voting: bool) -> None:
    query, key, mask, votes = inputs(5, 7, 3, form)
    args = (query, key, mask, votes if voting else None, 0.4, others)
    torch.testing.assert_close(attention_columns(*args).double(), brute_force(*args), rtol=1e-5, atol=1e-6)


def test_a_row_of_nothing_pays_nothing() -> None:
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    found = attention_columns(query, key, mask, None, 1.0, False)
    assert found[0, 0, 1] == 0
    assert found.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    query, key, mask, votes = inputs(4, 4, 8, "keys")
    torch.library.opcheck(attention_columns, (query.to(dtype), key.to(dtype), mask, votes, 0.5, True))
