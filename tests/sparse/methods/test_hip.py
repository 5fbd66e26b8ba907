"""HiP (arXiv:2406.09827): the best halves of spans, rated by their middle keys, down to single blocks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build
from tests.sparse.eager import cut_of, look_alike, reading
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, blocks_to_tokens
from tokcc.errors import PlanError
from tokcc.passes.sparse.selectors.tree_descent import TreeDescent

BLOCK = 4
Array = npt.NDArray[Any]


def descend(query: Array, key: Array, begin: int, end: int, count: int, block: int) -> set[int]:
    """The blocks that one row of queries finds among ``begin .. end - 1``."""
    length = max(end - begin, 0)
    borders = [begin + i * length // count for i in range(count + 1)]
    spans = [(a, z) for a, z in itertools.pairwise(borders) if z > a]
    while any(z - a > 1 for a, z in spans):
        halves = [
            half for a, z in spans for half in ((a, a + (z - a) // 2), (a + (z - a) // 2, z)) if half[1] > half[0]
        ]
        middle = [key[(a * block + z * block) // 2] for a, z in halves]
        rating = [max(float(q @ k) for q in query) for k in middle]
        order = sorted(range(len(halves)), key=lambda i: -rating[i])
        spans = [halves[i] for i in order[:count]]
    return {a for a, _ in spans}


def table_of(query: Array, key: Array, count: int, sinks: int, local: int, block: int) -> Array:
    new, total = len(query), len(key)
    table = np.zeros((-(-new // block), -(-total // block)), bool)
    for row in range(len(table)):
        first = total - new + row * block
        own, last = first // block, (min(first + block, total) - 1) // block
        table[row, : min(sinks, last + 1)] = True
        table[row, max(own - local, 0) : last + 1] = True
        found = descend(query[row * block : (row + 1) * block], key, sinks, own - local, count, block)
        table[row, sorted(found)] = True
    return table


def rule(count: int, sinks: int, local: int) -> Any:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        pairs = zip(look.query.double().numpy(), look.repeated.double().numpy(), strict=True)
        tables = np.stack([table_of(q, k, count, sinks, local, BLOCK) for q, k in pairs])
        return blocks_to_tokens(torch.from_numpy(tables), BLOCK, BLOCK, look.new, look.total)

    return reads


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt-neox", marks=pytest.mark.slow)])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    wanted = policy("hip", block=BLOCK, found=2, sinks=1, local=1, longest=64, length=0)
    assert_equals_rule(family, wanted, rule(2, 1, 1), tmp_path)


@pytest.mark.parametrize(("new", "total"), [(150, 150), (37, 90), (5, 133)])
@pytest.mark.parametrize(("count", "longest"), [(3, 150), (4, 4096), (1, 160)])
def test_tables(new: int, total: int, count: int, longest: int) -> None:
    """More rounds than are needed change nothing."""
    query, key = look_alike(4, 2, new, total)
    select = TreeDescent(blocks=count, sinks=2, local=1, longest=longest)
    read, _ = reading(cut_of(query, key, BLOCK, BLOCK), None, select)
    for head in range(4):
        q, k = query[0, head].double().numpy(), key[0, head // 2].double().numpy()
        assert np.array_equal(read[0, head].numpy(), table_of(q, k, count, 2, 1, BLOCK))


def test_blocks_of_equal_keys_are_the_best_blocks() -> None:
    """Spans that double from 2 and have one key each: what is found is what is best."""
    generator = torch.Generator().manual_seed(2)
    blocks, count = 16, 4
    rating = torch.randperm(count, generator=generator).repeat_interleave(blocks // count).float() + 1
    key = rating.repeat_interleave(BLOCK)[None, None, :, None] * torch.ones(1, 1, 1, 2)
    own = torch.zeros(1, 1, BLOCK, 2)
    read, _ = reading(
        cut_of(torch.ones(1, 1, BLOCK, 2), torch.cat([key, own], 2), BLOCK, BLOCK),
        None,
        TreeDescent(blocks=count, longest=68),
    )
    assert set(read[0, 0, 0].nonzero().flatten().tolist()) == {*rating.topk(count).indices.tolist(), blocks}


def test_a_past_of_no_more_blocks_is_everything() -> None:
    cut = cut_of(*look_alike(4, 2, 30, 47), BLOCK, BLOCK)
    read, _ = reading(cut, None, TreeDescent(blocks=12))
    assert torch.equal(read, cut.visible.expand_as(read))


def test_refused(tmp_path: Path) -> None:
    select = {"kind": "tree_descent", "share": "group_max"}
    with pytest.raises(PlanError, match="finds blocks of its own"):
        build("llama", policy("hip", select=select), tmp_path)
