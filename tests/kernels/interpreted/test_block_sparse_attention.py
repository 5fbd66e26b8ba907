"""The block-sparse attention kernel against a brute force, block by block."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.sparse_oracle import brute_force, lists
from tokcc.kernels.block_sparse_attention.triton import launch
from tokcc.kernels.configs import Config

SLOW = pytest.mark.slow
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BLOCK = 32
SMALL = Config({"BQ": 32, "BK": 32}, 4, 1)


def slowly(*cases: tuple[int, ...]) -> list[Any]:
    return [pytest.param(*case, marks=SLOW) for case in cases]


def check(dtype: torch.dtype = torch.float32, config: Config | None = SMALL, **given: Any) -> None:
    args = lists(**{"block_q": BLOCK, "block_k": BLOCK, **given}).to(dtype)
    found = launch(*args.call(), config=config)
    assert found.dtype == dtype
    expected = brute_force(args)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("keys", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
@pytest.mark.parametrize("few", [False, pytest.param(True, marks=SLOW)], ids=["all", "one"])
def test_lengths(keys: int, few: bool) -> None:
    check(rows=keys, keys=keys, few=few, heads=4, kv_heads=1)


@pytest.mark.parametrize(("rows", "keys"), [(33, 70), *slowly((1, 70), (5 * BLOCK + 3, 7 * BLOCK + 1))])
@pytest.mark.parametrize("causal", [False, True])
def test_fewer_queries_than_keys(rows: int, keys: int, causal: bool) -> None:
    check(rows=rows, keys=keys, causal=causal)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "of_lists"), [(4, 2, 2), *slowly((4, 4, 1), (4, 1, 4), (4, 2, 1), (4, 2, 4))]
)
def test_heads_and_dtypes(dtype: torch.dtype, heads: int, kv_heads: int, of_lists: int) -> None:
    check(dtype, rows=40, keys=70, heads=heads, kv_heads=kv_heads, of_lists=of_lists, batch=2)


@pytest.mark.parametrize(
    ("width", "out_width"), [(80, 80), *slowly((64, 64), (96, 96), (128, 128), (256, 256), (8, 20))]
)
def test_widths(width: int, out_width: int) -> None:
    check(rows=34, keys=66, width=width, out_width=out_width)


@pytest.mark.parametrize(("block_q", "block_k"), [(24, 40), *slowly(*itertools.product([16, 24, 64], [16, 40, 64]))])
def test_blocks_that_are_no_tiles(block_q: int, block_k: int) -> None:
    check(rows=70, keys=101, block_q=block_q, block_k=block_k)


def test_the_tables_own_configuration() -> None:
    check(config=None, rows=70, keys=101)
    check(config=None, rows=130, keys=150, block_q=128, block_k=64)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_not_seen_and_rows_of_padding_are_zero(causal: bool) -> None:
    check(rows=70, keys=70, padded=40, causal=causal, batch=2)


def test_views_with_gaps() -> None:
    check(rows=40, keys=70, transposed=True)


def test_capped_logits() -> None:
    check(rows=40, keys=70, softcap=0.7)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_a_bias_of_each_key(softcap: float) -> None:
    check(rows=40, keys=70, heads=4, kv_heads=2, of_lists=2, batch=2, padded=5, softcap=softcap, biased=True)


def test_long_ids() -> None:
    args = lists(rows=40, keys=70, block_q=BLOCK, block_k=BLOCK)
    long = replace(args, index=args.index.long(), count=args.count.long())
    assert torch.equal(launch(*long.call(), config=SMALL), launch(*args.call(), config=SMALL))
