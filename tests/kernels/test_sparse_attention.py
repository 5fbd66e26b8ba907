"""``tokcc::block_sparse_attention`` and ``tokcc::sparse_decode`` on the CPU against a brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.sparse_oracle import brute_force, lists
from tokcc.kernels import block_sparse_attention, sparse_decode
from tokcc.kernels.decompositions import DECOMPOSITIONS

SHAPES: list[dict[str, Any]] = [
    {"rows": 1, "keys": 1, "heads": 4},
    {"rows": 31, "keys": 31, "few": True},
    {"rows": 163, "keys": 163, "heads": 4, "kv_heads": 2, "of_lists": 4, "batch": 2},
    {"rows": 33, "keys": 70, "heads": 4, "kv_heads": 4, "of_lists": 1, "out_width": 5},
    {"rows": 40, "keys": 70, "causal": False, "heads": 4, "kv_heads": 2, "of_lists": 2},
    {"rows": 40, "keys": 70, "softcap": 0.7, "block_k": 40},
    {"rows": 40, "keys": 70, "heads": 4, "kv_heads": 2, "of_lists": 4, "batch": 2, "softcap": 0.7, "biased": True},
    {"rows": 1, "keys": 70, "heads": 4, "kv_heads": 2, "of_lists": 2, "block_q": 1, "block_k": 1, "biased": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_equals_brute_force(shape: dict[str, Any]) -> None:
    args = lists(**{"block_q": 32, "block_k": 32, **shape})
    expected = brute_force(args)
    sees = expected.any(-1)  # what a query that sees nothing gets is not defined
    assert sees.sum() >= min(20, sees.numel())
    for form in (block_sparse_attention, DECOMPOSITIONS["block_sparse_attention"]):
        found = form(*args.call())
        assert found.isfinite().all()
        torch.testing.assert_close(found[sees].double(), expected[sees], rtol=2e-6, atol=2e-6)


def test_keys_that_are_not_there_yet() -> None:
    """There may be more keys than the mask tells of, and blocks in any order."""
    args = lists(rows=5, keys=70, block_q=4, block_k=16, heads=4, kv_heads=2, of_lists=2, padded=3, batch=2)
    q, k, v, index, count, *rest = args.call()
    room = torch.full([2, 2, 26, 16], 7.0)
    wanted = brute_force(args)
    for form in (block_sparse_attention, DECOMPOSITIONS["block_sparse_attention"]):
        found = form(q, torch.cat([k, room], 2), torch.cat([v, room], 2), index, count, *rest)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
        meant = torch.arange(index.shape[3]) < count[..., None]
        turned = torch.where(meant, index.where(meant, index.new_tensor(-1)).sort(-1, descending=True)[0], index)
        found = form(q, k, v, turned, count, *rest)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


def test_one_query_is_the_decode_of_its_list() -> None:
    args = lists(rows=1, keys=163, block_q=1, block_k=16, heads=4, kv_heads=2, of_lists=2, padded=20, batch=2)
    q, k, v, index, count, _, page, _, scale, valid, *_ = args.call()
    for form in (sparse_decode, DECOMPOSITIONS["sparse_decode"]):
        found = form(q, k, v, index[:, :, 0], count[:, :, 0], page, scale, valid)
        torch.testing.assert_close(found.double(), brute_force(args), rtol=2e-6, atol=2e-6)


def test_opcheck() -> None:
    args = lists(rows=40, keys=70, block_q=32, block_k=32, heads=4, kv_heads=2)
    torch.library.opcheck(block_sparse_attention, args.call())
    one = lists(rows=1, keys=70, block_q=1, block_k=8, heads=4, kv_heads=2)
    q, k, v, index, count, _, page, _, scale, valid, *_ = one.call()
    torch.library.opcheck(sparse_decode, (q, k, v, index[:, :, 0], count[:, :, 0], page, scale, valid))
