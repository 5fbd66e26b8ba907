"""What operations are in aten: the same numbers, and sizes that stay dynamic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.kernels.sparse_oracle import brute_force, lists
from tokcc import kernels
from tokcc.kernels.decompositions import DECOMPOSITIONS, LOOPS, overload

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

Call = Callable[..., Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranks(*shape: int, seed: int = 0) -> Tensor:
    """Positions in random order along the last axis."""
    return random(*shape, seed=seed).argsort(-1)


def attention(batch: int, length: int) -> tuple[Tensor, ...]:
    real = torch.arange(length) >= torch.arange(batch)[:, None]
    kinds = (random(batch, 4, length, 8), random(batch, 2, length, 8, seed=1), random(batch, 2, length, 8, seed=2))
    return (*kinds, real, random(batch, 2, length, seed=3))


CASES: dict[str, tuple[Call, Callable[[int, int], tuple[Tensor, ...]]]] = {
    "attention_columns": (
        lambda op, q, k, mask, votes: op(q, k, mask[:, None, None], votes, 0.3, True),
        lambda b, n: (
            random(b, 2, n, 4),
            random(b, 2, n, 4, seed=1),
            torch.arange(n) < n - torch.arange(b)[:, None],
            random(b, n, seed=2).abs(),
        ),
    ),
    "attention_probs": (
        lambda op, q, k, mask: op(q, k, mask[:, None, None], 0.3),
        lambda b, n: (random(b, 2, 3, 4), random(b, 2, n, 4, seed=1), torch.arange(n) < n - torch.arange(b)[:, None]),
    ),
    "block_maxima": (
        lambda op, q, k, a, c, real: op(q[:, :, 2:], k, a[:, :, 2:], c, real, 4, 3),
        lambda b, n: (*attention(b, n)[:2], random(b, 4, n, seed=4), random(b, 4, n, seed=5), attention(b, n)[3]),
    ),
    "cached_attention": (
        lambda op, q, k, v, real, bias: op(q, k, v, real, 3, 0.3, 5.0, bias),
        attention,
    ),
    "choose_by_size": (
        lambda op, x, y: op(x, y, [x.shape[1], 4], [10, 4], [14, 9]),
        lambda b, n: (random(b, n), random(b, n, seed=1)),
    ),
    "diagonal_sums": (lambda op, x: op(x), lambda b, n: (random(b, 2, 3, n).tril(n - 3),)),
    "gather_slots": (lambda op, x, i: op(x, i), lambda b, n: (random(b, 2, n, 4), ranks(b, 2, n)[..., :3])),
    "gather_tokens": (lambda op, x, i: op(x, i, 1, 0), lambda b, n: (random(b, n, 4), ranks(b, n)[:, :3])),
    "merge_tokens": (
        lambda op, x, w, order, slot: op(x, w, order[:, 2:], order[:, :2], slot, 1, True),
        lambda b, n: (random(b, n, 4), random(b, n, seed=1).abs(), ranks(b, n), ranks(b, 2)),
    ),
    "retain_slots": (lambda op, x: op(x, 3), lambda b, n: (random(b, 2, n),)),
    "scatter_tokens": (
        lambda op, x, i, v: op(x, i, v),
        lambda b, n: (random(b, n, 4), ranks(b, n)[:, :3], random(b, 3, 4, seed=1)),
    ),
    "sparse_decode": (
        lambda op, q, k, i: op(q, k, k, i.int(), torch.full(i.shape[:2], 2, dtype=torch.int32), 2, 0.3),
        lambda b, n: (random(b, 4, 1, 8), random(b, 2, n, 8, seed=1), ranks(b, 2, 4)[..., :3]),
    ),
    "split_blocks": (lambda op, x: op(x, 1, 4), lambda b, n: (random(b, n, 3),)),
    "topk_select": (lambda op, x: op(x, 3, True), lambda b, n: (random(b, n).round(),)),
}
"""How each is called, and with what for a batch and a length."""


def test_every_operation_has_a_form_or_a_reason() -> None:
    # Lists of keys have cases of their own below.
    assert set(CASES) | {"block_sparse_attention"} == set(DECOMPOSITIONS)
    assert set(DECOMPOSITIONS) | set(LOOPS) >= set(kernels.__all__)
    assert not set(DECOMPOSITIONS) & set(LOOPS)


def same(got: Any, want: Any) -> None:
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_it_equals_the_operation_at_other_sizes(name: str) -> None:
    call, given = CASES[name]

    class Uses(nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return call(overload(name), *args)

    example = given(2, 11)
    batch, length = Dim("batch", min=1, max=30), Dim("length", min=9, max=300)
    axes = tuple(
        {axis: batch if axis == 0 else length for axis, size in enumerate(x.shape) if axis == 0 or size == 11}
        for x in example
    )
    program = torch.export.export(Uses(), example, dynamic_shapes=(axes,), strict=False)
    module = program.run_decompositions({overload(name): DECOMPOSITIONS[name]}).module()
    for b, n in ((1, 9), (3, 12), (4, 17)):
        args = given(b, n)
        same(module(*args), call(overload(name), *args))


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 64, "keys": 64, "block_q": 16, "block_k": 16},
        {"rows": 50, "keys": 83, "block_q": 16, "block_k": 32, "heads": 4, "kv_heads": 2, "of_lists": 2, "batch": 2},
        {
            "rows": 33,
            "keys": 70,
            "block_q": 32,
            "block_k": 16,
            "heads": 4,
            "kv_heads": 2,
            "of_lists": 4,
            "out_width": 8,
        },
        {"rows": 40, "keys": 40, "block_q": 16, "block_k": 16, "batch": 2, "padded": 20, "causal": False},
        {"rows": 48, "keys": 48, "block_q": 16, "block_k": 16, "few": True},
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_lists_of_keys(shape: dict[str, Any], softcap: float) -> None:
    case = replace(lists(**shape), softcap=softcap)
    sees = brute_force(case).any(-1)  # what a query that sees nothing gets is not defined
    forms = (DECOMPOSITIONS["block_sparse_attention"], kernels.block_sparse_attention)
    same(*(form(*case.call())[sees] for form in forms))
