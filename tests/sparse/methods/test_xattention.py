"""XAttention (arXiv:2503.16428): sums over antidiagonals, and as many blocks as hold a share of a row's sum."""

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
from tests.sparse.oracle import Look, blocks_to_tokens, causal
from tokcc.passes.sparse.scores.antidiagonal import Antidiagonal
from tokcc.passes.sparse.selectors.cumulative import Cumulative

BLOCK = 4
Array = npt.NDArray[Any]


def tile_sums(query: Array, key: Array, stride: int, block: int, scale: float) -> Array:
    """The paper's map of one head, ``[MQ, M]``: tiles count from the call's first query, and from slot 0."""
    new, total = len(query), len(key)
    table = np.zeros((-(-new // block), -(-total // block)))
    for a in range(-(-new // stride)):
        last = total - new + min((a + 1) * stride, new) - 1
        tiles = [t for t in range(-(-total // stride)) if t * stride <= last]
        sums = []
        for t in tiles:
            pairs = [(a * stride + stride - 1 - i, t * stride + i) for i in range(stride)]
            there = [(r, c) for r, c in pairs if r < new and c < total]
            sums.append(sum((float(query[r] @ key[c]) for r, c in there), 0.0) * scale / stride)
        weights = np.exp(np.array(sums) - max(sums))
        for t, weight in zip(tiles, weights / weights.sum(), strict=True):
            table[a * stride // block, t * stride // block] += weight
    return table


def chosen(table: Array, mass: float, past: int, new: int, block: int) -> Array:
    """The first block and those of the row's own tokens, then the largest until they hold the share."""
    keep = np.zeros(table.shape, bool)
    for row in range(len(table)):
        first, last = past + row * block, min(past + (row + 1) * block, past + new) - 1
        must = {0, *range(first // block, last // block + 1)}
        seen = range(last // block + 1)
        got, need = sum(table[row, j] for j in must), mass * sum(table[row, j] for j in seen)
        keep[row, sorted(must)] = True
        for j in sorted(set(seen) - must, key=lambda j: -table[row, j]):
            if got >= need:
                break
            keep[row, j], got = True, got + table[row, j]
    return keep


def rule(mass: float, stride: int, share: str = "each") -> Any:
    def reads(look: Look) -> Tensor:
        query, key = (x.double().numpy() for x in (look.query, look.repeated))
        maps = np.stack([tile_sums(q, k, stride, BLOCK, look.scale) for q, k in zip(query, key, strict=True)])
        if share == "group_mean":
            groups = len(query) // len(look.key)
            maps = maps.reshape(-1, groups, *maps.shape[1:]).mean(1).repeat(groups, 0)
        tables = np.stack([chosen(table, mass, look.total - look.new, look.new, BLOCK) for table in maps])
        return blocks_to_tokens(torch.from_numpy(tables), BLOCK, BLOCK, look.new, look.total)

    return lambda look: reads(look) if look.new > 1 else None


def own(**arguments: Any) -> Any:
    return policy("xattention", block=BLOCK, key_block=BLOCK, length=0, **{"stride": 2, "mass": 0.6, **arguments})


@pytest.mark.parametrize("share", ["each", pytest.param("group_mean", marks=pytest.mark.slow)])
def test_equals_the_formula(share: str, tmp_path: Path) -> None:
    assert_equals_rule("llama", own(share=share), rule(0.6, 2, share), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt-neox"])
def test_other_decoders(family: str, tmp_path: Path) -> None:
    assert_equals_rule(family, own(share="group_mean", stride=4), rule(0.6, 4, "group_mean"), tmp_path)


def test_a_share_of_less_than_everything_leaves_blocks_out() -> None:
    cut = cut_of(*look_alike(4, 2, 40, 40), BLOCK, BLOCK)
    read, _ = reading(cut, Antidiagonal(stride=2), Cumulative(mass=0.6, sinks=1))
    assert 0.2 < float(read.float().sum() / torch.ones(10, 10).tril().sum() / 4) < 0.9


@pytest.mark.parametrize(("new", "total"), [(40, 40), (23, 23), (13, 30)])
def test_a_stride_of_one_is_the_mass_of_blocks(new: int, total: int) -> None:
    query, key = look_alike(4, 2, new, total)
    cut = cut_of(query, key, BLOCK, BLOCK)
    rating = Antidiagonal(stride=1).emit(cut)
    logits = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    probs = torch.softmax(logits.masked_fill(~causal(new, total), -torch.inf), -1)[0]
    for row in range(-(-new // BLOCK)):
        for block in range(-(-total // BLOCK)):
            exact = probs[:, row * BLOCK : (row + 1) * BLOCK, block * BLOCK : (block + 1) * BLOCK].sum((1, 2))
            torch.testing.assert_close(rating[0, :, row, block].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", ["each", "group_mean", "all_mean"])
def test_the_whole_mass_is_everything(share: Any) -> None:
    cut = cut_of(*look_alike(4, 2, 30, 47), BLOCK, BLOCK)
    read, _ = reading(cut, Antidiagonal(stride=2), Cumulative(mass=1.0, sinks=1, share=share))
    assert torch.equal(read, cut.visible.expand_as(read))


def test_rows_sum_to_the_number_of_tiles() -> None:
    cut = cut_of(*look_alike(4, 2, 40, 40), BLOCK * 2, BLOCK)
    rating = Antidiagonal(stride=2).emit(cut)
    torch.testing.assert_close(rating.sum(3), torch.full((1, 4, 5), 4.0))
