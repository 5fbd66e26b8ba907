"""MInference (arXiv:2407.02490): heads read columns and distances, the edges of the sequence, or the best blocks."""

from __future__ import annotations

import json
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
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.sparse.lines import blocks_of_distances
from tokcc.passes.sparse.scores.pooled import Pooled
from tokcc.passes.sparse.selectors.best_rated import BestRated
from tokcc.passes.sparse.selectors.by_head import ByHead
from tokcc.passes.sparse.selectors.columns_and_distances import ColumnsAndDistances
from tokcc.passes.sparse.selectors.first_and_near import FirstAndNear

BLOCK = 4
LINES = {"columns": 6, "distances": 7, "queries": 8, "first": 2, "near": 3}
Array = npt.NDArray[Any]


def lines(query: Array, key: Array, scale: float, columns: int, distances: int, queries: int, first: int, near: int
          ) -> tuple[list[int], list[int]]:  # fmt: skip
    """The columns and distances that the last queries of one head look at."""
    new, total = len(query), len(key)
    column, distance = np.zeros(total), np.zeros(total)
    for row in range(max(new - queries, 0), new):
        place = total - new + row
        logits = key[: place + 1] @ query[row] * scale
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for j in range(place + 1):
            column[j] += weights[j]
            distance[place - j] += weights[j]
    column[:first], distance[:near] = np.inf, np.inf
    best = [np.argsort(-x, kind="stable").tolist() for x in (column, distance)]
    return best[0][: max(columns, first)], best[1][: max(distances, near)]


def token_pattern(columns: list[int], distances: list[int], new: int, total: int) -> Array:
    """What MInference means, key by key: bool ``[S, L]``."""
    read = np.zeros((new, total), bool)
    for row in range(new):
        place = total - new + row
        for j in range(place + 1):
            read[row, j] = j in columns or place - j in distances
    return read


def touched(read: Array, block: int) -> Array:
    """The blocks in which anything is read, and those of the row's own tokens: bool ``[MQ, M]``."""
    new, total = read.shape
    table = np.zeros((-(-new // block), -(-total // block)), bool)
    for row in range(new):
        table[row // block, (total - new + row) // block] = True
        for j in range(total):
            table[row // block, j // block] |= read[row, j]
    return table


def edges(new: int, total: int, first: int, near: int) -> Array:
    return np.array([[j < first or p - near < j <= p for j in range(total)] for p in range(total - new, total)])


def best_blocks(query: Array, key: Array, count: int, block: int) -> Array:
    new, total = len(query), len(key)
    means = [[x[i : i + block].mean(0) for i in range(0, len(x), block)] for x in (query, key)]
    table = np.zeros((len(means[0]), len(means[1])), bool)
    for row, mean in enumerate(means[0]):
        first, last = total - new + row * block, min(total - new + (row + 1) * block, total) - 1
        own = list(range(first // block, last // block + 1))
        rest = sorted(range(own[0]), key=lambda j: -float(mean @ means[1][j]))
        table[row, own + rest[: max(count - len(own), 0)]] = True
    return table


def pattern_table(query: Array, key: Array, scale: float, pattern: dict[str, Any]) -> Array:
    given = {name: value for name, value in pattern.items() if name not in ("kind", "score")}
    if pattern["kind"] == "first_and_near":
        return touched(edges(len(query), len(key), **given), BLOCK)
    if pattern["kind"] == "best_rated":
        return best_blocks(query, key, given["blocks"], BLOCK)
    return touched(token_pattern(*lines(query, key, scale, **given), len(query), len(key)), BLOCK)


def rule(patterns: list[list[dict[str, Any]]]) -> Any:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        query, key = (x.double().numpy() for x in (look.query, look.repeated))
        heads = zip(query, key, patterns[look.layer], strict=True)
        tables = np.stack([pattern_table(q, k, look.scale, pattern) for q, k, pattern in heads])
        return blocks_to_tokens(torch.from_numpy(tables), BLOCK, BLOCK, look.new, look.total)

    return reads


VERTICAL = {"kind": "columns_and_distances", **LINES}
OTHER = {**VERTICAL, "columns": 3, "distances": 9}
EDGES = {"kind": "first_and_near", "first": 5, "near": 7}
RATED = {"kind": "best_rated", "score": {"kind": "pooled"}, "blocks": 4}
PATTERNS = [[VERTICAL, EDGES, RATED, VERTICAL], [EDGES] * 4, [RATED, OTHER, OTHER, VERTICAL]]


def own(**arguments: Any) -> Any:
    return policy("minference", block=BLOCK, length=0, **arguments)


def test_heads_with_patterns_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"patterns": PATTERNS}))
    assert_equals_rule("llama", own(profile=str(path)), rule(PATTERNS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox"])
def test_columns_and_distances(family: str, tmp_path: Path) -> None:
    assert_equals_rule(family, own(**LINES), rule([[VERTICAL] * 4] * 3), tmp_path)


@pytest.mark.parametrize(("new", "total"), [(37, 37), (18, 57), (3, 30)])
def test_lines_are_the_published_ones(new: int, total: int) -> None:
    query, key = look_alike(4, 2, new, total)
    read, _ = reading(cut_of(query, key, BLOCK, BLOCK), None, ColumnsAndDistances(**LINES))
    for head in range(4):
        q, k = query[0, head].double().numpy(), key[0, head // 2].double().numpy()
        tokens = token_pattern(*lines(q, k, 8**-0.5, **LINES), new, total)
        assert np.array_equal(read[0, head].numpy(), touched(tokens, BLOCK))
        spread = blocks_to_tokens(read[:, head], BLOCK, BLOCK, new, total)[0].numpy()
        assert spread[tokens].all()  # whole blocks: more than the pattern, and all of it


def test_a_distance_touches_the_blocks_it_leads_to() -> None:
    for block_q, block_k, new, total in ((4, 4, 13, 30), (8, 4, 16, 16), (4, 6, 10, 29)):
        cut = cut_of(*look_alike(2, 2, new, total), block_q, block_k)
        for distance in range(total):
            chosen = torch.zeros(1, 1, total, dtype=torch.bool)
            chosen[..., distance] = True
            wanted = torch.zeros(int(cut.rows), int(cut.blocks), dtype=torch.bool)
            for row in range(new):
                place = total - new + row - distance
                if place >= 0:
                    wanted[row // block_q, place // block_k] = True
            assert torch.equal(blocks_of_distances(cut, chosen)[0, 0], wanted)


@pytest.mark.parametrize("select", [ColumnsAndDistances(columns=99), ColumnsAndDistances(distances=99), FirstAndNear(),
                                    BestRated(score=Pooled())])  # fmt: skip
def test_sizes_beyond_the_sequence_are_everything(select: Any) -> None:
    cut = cut_of(*look_alike(4, 2, 30, 47), BLOCK, BLOCK)
    read, _ = reading(cut, None, select)
    assert torch.equal(read, cut.visible.expand_as(read))


def test_lists_may_be_shared_where_heads_have_no_patterns_of_their_own() -> None:
    shared = ColumnsAndDistances(**LINES, share="group_mean")
    cut = cut_of(*look_alike(4, 2, 37, 37), BLOCK, BLOCK)
    wanted, found = (reading(cut, None, piece)[0] for piece in (shared, ByHead(otherwise=shared)))
    assert found.shape[1] == 2
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="single heads"):
        ByHead(heads=((ColumnsAndDistances(**LINES),) * 4,), otherwise=shared)


def test_heads_that_share_keys_may_share_lines() -> None:
    cut = cut_of(*look_alike(4, 2, 37, 37), BLOCK, BLOCK)
    read, _ = reading(cut, None, ColumnsAndDistances(**LINES, share="group_mean"))
    assert read.shape[1] == 2


def refused(wanted: dict[str, Any], tmp_path: Path) -> str:
    with pytest.raises((PlanError, PolicyError)) as caught:
        build("llama", wanted, tmp_path)
    return str(caught.value)


def test_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"patterns": [row[:3] for row in PATTERNS]}))
    assert "patterns for 4 query heads in layer 0, not 3" in refused(own(profile=str(path)), tmp_path)
    path.write_text(json.dumps({"patterns": PATTERNS[:1]}))
    assert "patterns for layer 1" in refused(own(profile=str(path)), tmp_path)
    path.write_text(json.dumps({"patterns": [[{"kind": "best"}] * 4] * 3}))
    assert "`best` is no pattern" in refused(own(profile=str(path)), tmp_path)
    assert "cannot be read" in refused(own(profile=str(tmp_path / "none.json")), tmp_path)
    assert "a budget would mean nothing" in refused(own(budget={"keep": 0.5}), tmp_path)


def test_equal_patterns_are_looked_at_together() -> None:
    cut = cut_of(*look_alike(4, 2, 37, 37), BLOCK, BLOCK)
    alone, mixed = ColumnsAndDistances(**LINES), FirstAndNear(first=5, near=7)
    table = ByHead(otherwise=mixed, heads=((alone, mixed, alone, mixed),)).whole_table(cut)
    assert torch.equal(table[:, [0, 2]], alone.whole_table(cut)[:, [0, 2]])
    assert torch.equal(table[:, [1, 3]], mixed.whole_table(cut).expand(1, 4, -1, -1)[:, [1, 3]])
