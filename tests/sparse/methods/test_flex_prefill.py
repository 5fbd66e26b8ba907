"""FlexPrefill (arXiv:2502.20766): blocks of columns and distances that hold a share, or the best of the pooled map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.sparse.eager import cut_of, look_alike, reading
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, blocks_to_tokens
from tokcc.passes.sparse.selectors.lines_or_map import LinesOrMap

BLOCK = 4
Array = npt.NDArray[Any]


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max())
    return weights / weights.sum()  # type: ignore[no-any-return]


def tokens_above(x: Array, mass: float) -> int:
    """Tokens that it takes to get above the share, the largest first."""
    got, count = 0.0, 0
    for value in sorted(x.tolist(), reverse=True):
        got, count = got + value, count + 1
        if got > mass:
            break
    return count


def in_blocks(x: Array, block: int) -> Array:
    return np.array([x[i : i + block].sum() for i in range(0, len(x), block)])


def divergence(query: Array, key: Array, columns: Array, scale: float, block: int) -> float:
    mean = query[-block:].mean(0)
    guess = softmax(np.array([mean @ key[i : i + block].mean(0) * scale for i in range(0, len(key), block)]))
    true = in_blocks(columns, block)
    middle = (guess + true) / 2
    parts = [sum(p * np.log(p / m) for p, m in zip(x, middle, strict=True) if p > 0) for x in (guess, true)]
    return float(np.sqrt(sum(parts) / 2))


def best(rating: Array, count: int) -> set[int]:
    """The first one, and those with the largest sums."""
    return set([0, *sorted(range(1, len(rating)), key=lambda j: -rating[j])][:count])


def table_of(query: Array, key: Array, scale: float, mass: float, limit: float, least: int, block: int
             ) -> tuple[Array, bool]:  # fmt: skip
    """What one head reads by block, and whether it went by the map."""
    new, total = len(query), len(key)
    past, last = total - new, min(block, new)
    columns, distances = np.zeros(total), np.zeros(total)
    for row in range(new - last, new):
        probs = softmax(key[: past + row + 1] @ query[row] * scale)
        for j, p in enumerate(probs):
            columns[j] += p / last
            distances[past + row - j] += p / last
    floor = -(-least // block)
    aware = divergence(query, key, columns, scale, block) < limit
    counts = [floor if aware else max(tokens_above(x, mass) // block + 1, floor) for x in (columns, distances)]
    vertical, away = (best(in_blocks(x, block), n) for x, n in zip((columns, distances), counts, strict=True))
    rows, blocks = -(-new // block), -(-total // block)
    table = np.zeros((rows, blocks), bool)
    entries = []
    for row in range(rows):
        first, end = past + row * block, min(past + (row + 1) * block, total) - 1
        own = range(first // block, end // block + 1)
        table[row, own] = True
        for j in range(own[-1] + 1):
            table[row, j] |= j in vertical or own[0] - j in away or own[-1] - j in away
        seen = [key[j * block : (j + 1) * block].mean(0) for j in range(own[-1] + 1)]
        chances = softmax(np.array([query[row * block : (row + 1) * block].mean(0) @ k * scale for k in seen]))
        entries += [(float(p), row, j) for j, p in enumerate(chances)]
    if aware:
        got = 0.0
        for p, row, j in sorted(entries, reverse=True):
            got += p
            if got > mass * rows:
                break
            table[row, j] = True
    return table, aware


def rule(mass: float, limit: float, least: int, decided: list[bool]) -> Any:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        pairs = zip(look.query.double().numpy(), look.repeated.double().numpy(), strict=True)
        made = [table_of(q, k, look.scale, mass, limit, least, BLOCK) for q, k in pairs]
        decided.extend(aware for _, aware in made)
        tables = torch.from_numpy(np.stack([table for table, _ in made]))
        return blocks_to_tokens(tables, BLOCK, BLOCK, look.new, look.total)

    return reads


def own(**arguments: Any) -> Any:
    return policy("flex-prefill", block=BLOCK, length=0, **arguments)


def test_equals_the_formula(tmp_path: Path) -> None:
    decided: list[bool] = []
    wanted = own(mass=0.6, divergence=0.1525, least=5)
    assert_equals_rule("llama", wanted, rule(0.6, 0.1525, 5, decided), tmp_path)
    assert 0.1 < np.mean(decided) < 0.9  # heads of both kinds


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_without_the_map(family: str, tmp_path: Path) -> None:
    assert_equals_rule(family, own(mass=0.5, divergence=0.0, least=1), rule(0.5, 0.0, 1, []), tmp_path)


@pytest.mark.parametrize(("new", "total"), [(40, 40), (23, 41), (3, 18)])
@pytest.mark.parametrize("limit", [0.0, 0.2, 9.0])
def test_tables(new: int, total: int, limit: float) -> None:
    query, key = look_alike(4, 2, new, total, seed=3)
    read, _ = reading(cut_of(query, key, BLOCK, BLOCK), None, LinesOrMap(mass=0.6, divergence=limit, least=5))
    for head in range(4):
        q, k = query[0, head].double().numpy(), key[0, head // 2].double().numpy()
        table, aware = table_of(q, k, 8**-0.5, 0.6, limit, 5, BLOCK)
        assert np.array_equal(read[0, head].numpy(), table)
        assert aware or limit < 9.0


def test_everything_where_everything_is_wanted() -> None:
    cut = cut_of(*look_alike(4, 2, 30, 47), BLOCK, BLOCK)
    for select in (LinesOrMap(mass=1.0), LinesOrMap(mass=0.1, least=48)):
        read, _ = reading(cut, None, select)
        assert torch.equal(read, cut.visible.expand_as(read))


def test_the_most_that_is_read() -> None:
    cut = cut_of(*look_alike(4, 2, 48, 48), BLOCK, BLOCK)
    read, _ = reading(cut, None, LinesOrMap(mass=0.99, divergence=0.0, least=1, most=2 * BLOCK))
    assert 2 < int(read.sum(3).max()) <= 4
