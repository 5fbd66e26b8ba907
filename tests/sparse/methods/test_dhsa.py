"""DHSA (arXiv:2510.24606) with chunks of one size: tokens have the rating of their chunk, blocks that of the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.decoders.tiny import program_of
from tests.sparse.eager import cut_of, look_alike, reading
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, blocks_to_tokens
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library
from tokcc.passes.sparse.scores.chunked import Chunked
from tokcc.passes.sparse.scores.pooled import Pooled
from tokcc.passes.sparse.selectors.best_blocks import BestBlocks

Array = npt.NDArray[Any]


def token_ratings(query: Array, key: Array, chunk: int) -> Array:
    """The paper's upsampled map of one head, ``[S, L]``: -inf for what chunks of queries do not see."""
    new, total = len(query), len(key)
    rating = np.full((new, total), -np.inf)
    for a in range(0, new, chunk):
        for c in range(0, total, chunk):
            if c > total - new + min(a + chunk, new) - 1:
                continue
            q, k = query[a : a + chunk], key[c : c + chunk]
            rating[a : a + chunk, c : c + chunk] = (
                (math.sqrt(len(q)) * q.mean(0)) @ (math.sqrt(len(k)) * k.mean(0)) / math.sqrt(query.shape[1])
            )
    return rating


def block_ratings(query: Array, key: Array, chunk: int, block: int) -> Array:
    tokens = token_ratings(query, key, chunk)
    return np.array([[tokens[r : r + block, c : c + block].max() for c in range(0, len(key), block)]
                     for r in range(0, len(query), block)])  # fmt: skip


def rule(chunk: int, block: int, share_of_keys: float, shared: bool) -> Any:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        pairs = zip(look.query.double().numpy(), look.repeated.double().numpy(), strict=True)
        ratings = np.stack([block_ratings(q, k, chunk, block) for q, k in pairs])
        if shared:
            ratings = ratings.mean(0, keepdims=True)
        table = torch.zeros(ratings.shape, dtype=torch.bool)
        most = math.ceil(share_of_keys * ratings.shape[2])
        for head, row in np.ndindex(ratings.shape[:2]):
            first = look.total - look.new + row * block
            own = range(first // block, (min(first + block, look.total) - 1) // block + 1)
            must = {0, max(own[0] - 1, 0), *own}
            rest = sorted(set(range(own[-1] + 1)) - must, key=lambda j: -ratings[head, row, j])
            table[head, row, sorted(must)] = True
            table[head, row, rest[: max(most - len(must), 0)]] = True
        return blocks_to_tokens(table, block, block, look.new, look.total)

    return reads


@pytest.mark.parametrize(
    ("chunk", "share"),
    [
        (2, "all_mean"),
        pytest.param(4, "all_mean", marks=pytest.mark.slow),
        pytest.param(1, "each", marks=pytest.mark.slow),
    ],
)
def test_equals_the_formula(chunk: int, share: str, tmp_path: Path) -> None:
    wanted = policy("dhsa", block=4, chunk=chunk, length=0, keep=0.5, share=share)
    assert_equals_rule("llama", wanted, rule(chunk, 4, 0.5, share == "all_mean"), tmp_path)


@pytest.mark.parametrize(("new", "total"), [(40, 40), (13, 30)])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_ratings(new: int, total: int, chunk: int) -> None:
    query, key = look_alike(4, 2, new, total)
    cut = cut_of(query, key, 4, 4)
    rating = Chunked(chunk=chunk).emit(cut)
    for head in range(4):
        wanted = block_ratings(query[0, head].double().numpy(), key[0, head // 2].double().numpy(), chunk, 4)
        seen = cut.visible[0, 0].numpy()
        np.testing.assert_allclose(rating[0, head].numpy()[seen], wanted[seen], rtol=1e-4, atol=1e-5)


def test_chunks_as_long_as_blocks_are_pooled_blocks() -> None:
    cut = cut_of(*look_alike(4, 2, 30, 43), 4, 4)
    one, other = Chunked(chunk=4).emit(cut), Pooled(length="root").emit(cut)
    seen = cut.visible.expand_as(one)
    torch.testing.assert_close(one[seen], other[seen])


def test_a_chunk_of_equal_tokens_is_as_long_as_the_root_says() -> None:
    query, key = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert Chunked(chunk=4).emit(cut_of(query, key, 4, 4)).item() == pytest.approx(2 * 2 * 4 / 2)


def test_all_keys_are_everything() -> None:
    cut = cut_of(*look_alike(4, 2, 30, 47), 4, 4)
    read, _ = reading(cut, Chunked(chunk=2), BestBlocks(sinks=1))
    assert torch.equal(read, cut.visible.expand_as(read))


def test_a_budget_of_everything_is_said() -> None:
    program = program_of("llama")
    for keep, said in ((1.0, True), (0.5, False)):
        loaded = load_policy(policy("dhsa", keep=keep), presets=library())
        plan = make_cache_plan(loaded, program, cache_sites(program))
        assert any("reads everything" in warning for warning in plan.warnings) == said
