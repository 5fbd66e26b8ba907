"""``tokcc::attention_probs`` against the probabilities of ``scaled_dot_product_attention``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import attention_probs

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FORMS = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]  # which of B, H, R the mask has


def brute_force(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, rows, _ = query.shape
    tokens = key.shape[2]
    out = torch.zeros(batch, heads, rows, tokens, dtype=torch.float64)
    full = None if mask is None else mask.expand(batch, heads, rows, tokens)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                logits = []
                for n in range(tokens):
                    value = scale * sum(
                        a * c for a, c in zip(query[b, h, r].tolist(), key[b, h, n].tolist(), strict=True)
                    )
                    if full is not None:
                        own = full[b, h, r, n].item()
                        value = (value if own else -math.inf) if full.dtype == torch.bool else value + own
                    logits.append(value)
                top = max(logits)
                if top == -math.inf:
                    continue
                exps = [math.exp(v - top) for v in logits]
                out[b, h, r] = torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)
    return out


def _inputs(
    tokens: int, rows: int, form: tuple[int, int, int] | None, kind: str, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, 2, n, 3, generator=generator) for n in (rows, tokens))
    if form is None:
        return query, key, None
    shape = [size if used else 1 for size, used in zip((2, 2, rows), form, strict=True)]
    flags = torch.rand(*shape, tokens, generator=generator) > 0.4
    if kind == "bool":
        return query, key, flags
    noise = torch.randn(flags.shape, generator=generator)
    return query, key, noise if kind == "bias" else torch.zeros(flags.shape).masked_fill(~flags, -torch.inf)


@given(
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from([None, *FORMS]),
    st.sampled_from(["bool", "bias", "additive"]),
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(
    tokens: int, rows: int, form: tuple[int, int, int] | None, kind: str, dtype: torch.dtype, seed: int
) -> None:
    query, key, mask = _inputs(tokens, rows, form, kind, seed)
    query, key = query.to(dtype), key.to(dtype)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    found = attention_probs(query, key, mask, 0.5)
    assert found.dtype == dtype
    expected = brute_force(query, key, mask, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["bool", "bias", "additive"])
def test_is_what_the_fused_attention_applies(kind: str) -> None:
    """The value that identity values come out of SDPA with are its probabilities."""
    query, key, mask = _inputs(7, 3, (1, 0, 1), kind, 3)
    values = torch.eye(7).expand(2, 2, 7, 7)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, values, mask, scale=0.5)
    torch.testing.assert_close(attention_probs(query, key, mask, 0.5), fused.nan_to_num(0.0), rtol=1e-5, atol=1e-6)


def test_a_row_without_keys_is_zero() -> None:
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert attention_probs(query, key, mask, 0.5)[0, 0, 1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    query, key, mask = _inputs(5, 2, (1, 0, 0) if masked else None, "bool", 0)
    torch.library.opcheck(attention_probs, (query.to(dtype), key.to(dtype), mask, 0.5))
