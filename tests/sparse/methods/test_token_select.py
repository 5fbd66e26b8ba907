"""TokenSelect (arXiv:2411.02886): all heads vote for the tokens that a chunk of queries reads."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.sparse.eager import cut_of, look_alike, reading
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look
from tokcc.passes.budget import Count
from tokcc.passes.sparse.scores.soft_vote import SoftVote
from tokcc.passes.sparse.selectors.best_blocks import BestBlocks

Array = npt.NDArray[Any]


def tokens_of(query: Array, key: Array, first: int, count: int, sinks: int, local: int, scale: float) -> list[int]:
    """The tokens that a chunk ``[H, C, D]`` reads, whose first query is at slot ``first``."""
    end = first + query.shape[1]
    begin = max(first - local, 0)
    middle = range(min(sinks, begin), begin)
    vote = np.zeros(len(middle))
    for head, own in enumerate(query):
        logits = np.array([float(own.mean(0) @ key[head, j]) * scale for j in middle])
        if len(logits):
            weights = np.exp(logits - logits.max())
            vote += weights / weights.sum()
    fixed = [*range(min(sinks, begin)), *range(begin, end)]
    best = sorted(range(len(middle)), key=lambda i: -vote[i])[: max(count - len(fixed), 0)]
    return sorted([*fixed, *(middle[i] for i in best)])


def rule(chunk: int, count: int, sinks: int, local: int) -> Any:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        query, key = (x.double().numpy() for x in (look.query, look.repeated))
        read = torch.zeros(1, look.new, look.total, dtype=torch.bool)
        for start in range(0, look.new, chunk):
            first = look.total - look.new + start
            own = tokens_of(query[:, start : start + chunk], key, first, count, sinks, local, look.scale)
            read[:, start : start + chunk, own] = True
        return read

    return reads


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt-neox", marks=pytest.mark.slow)])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    wanted = policy("token-select", chunk=4, tokens=14, sinks=2, local=3, length=0, scaled=True)
    assert_equals_rule(family, wanted, rule(4, 14, 2, 3), tmp_path)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("new", "total"), [(40, 40), (10, 31)])
def test_lists(scaled: bool, new: int, total: int) -> None:
    query, key = look_alike(4, 2, new, total)
    cut = cut_of(query, key, 8, 1)
    select = BestBlocks(sinks=2, local=3, share="all_mean")
    read, vote = reading(cut, SoftVote(sinks=2, local=3, scaled=scaled), select, Count("tokens", Fraction(16)))
    assert read.shape[1] == 1
    assert vote is not None
    for row, start in enumerate(range(0, new, 8)):
        own, heads = query[0, :, start : start + 8].double().numpy(), key[0].repeat_interleave(2, 0).double().numpy()
        first = total - new + start
        wanted = tokens_of(own, heads, first, 16, 2, 3, 8**-0.5 if scaled else 1.0)
        assert read[0, 0, row].nonzero().flatten().tolist() == wanted
        competing = max(first - 3 - 2, 0)
        assert float(vote[0, 0, row].sum()) == pytest.approx(4.0 if competing else 0.0)


def test_one_head_votes_by_its_products() -> None:
    query, key = look_alike(1, 1, 1, 30)
    read, _ = reading(cut_of(query, key, 1, 1), SoftVote(), BestBlocks(), Count("tokens", Fraction(6)))
    best = (query[0, 0, 0] @ key[0, 0, :29].T).topk(5).indices
    assert sorted([*best.tolist(), 29]) == read[0, 0, 0].nonzero().flatten().tolist()


def test_as_many_tokens_as_there_are_is_everything() -> None:
    cut = cut_of(*look_alike(4, 2, 30, 47), 8, 1)
    read, _ = reading(cut, SoftVote(sinks=2), BestBlocks(sinks=2, share="all_mean"), Count("tokens", Fraction(99)))
    assert torch.equal(read, cut.visible.expand_as(read))
