"""SALE (arXiv:2505.24179): blocks with a logit, estimated from 4 bits, that counts beside the first and near keys."""

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
from tests.sparse.oracle import Look, Rule, blocks_to_tokens
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.sparse.scores.estimated_ratio import EstimatedRatio
from tokcc.passes.sparse.selectors.threshold import Threshold

QUERIES, KEYS, SINKS, NEAR = 8, 4, 1, 2
THETA = 0.12
"""With which the small model's heads read about half of what they need not."""
Array = npt.NDArray[Any]


def rounded(x: Array, bits: int) -> Array:
    """Every row on its own grid; halves to even, and rows of zeros stay zeros."""
    most = 2 ** (bits - 1) - 1
    made = np.zeros_like(x)
    for i, row in enumerate(x):
        largest = np.abs(row).max()
        if largest > 0:
            made[i] = np.clip(np.rint(row * most / largest), -most, most) * largest / most
    return made


def must_read(row: int, new: int, total: int) -> set[int]:
    """The first block, the row's own ones and those in front of it."""
    first, last = total - new + row * QUERIES, min(total - new + (row + 1) * QUERIES, total) - 1
    return {*range(min(SINKS, last // KEYS + 1)), *range(max(first // KEYS - NEAR, 0), last // KEYS + 1)}


def ratios(query: Array, key: Array, scale: float, bits: int | None) -> Array:
    """The largest ratio of each block of one head, ``[MQ, M]``; 0 where nothing is seen."""
    new, total = len(query), len(key)
    centred, mean = key - key.mean(0), query.mean(0)
    asked = query - mean
    if bits is None:  # without rounding, and keys as they are
        estimate, exact = query @ key.T * scale, query @ key.T * scale
    else:
        estimate = (rounded(asked, bits) @ rounded(centred, bits).T + mean @ centred.T) * scale
        exact = query @ centred.T * scale
    table = np.zeros((-(-new // QUERIES), -(-total // KEYS)))
    for i in range(new):
        own = total - new + i
        reference = [exact[i, j] for j in range(own + 1) if j // KEYS in must_read(i // QUERIES, new, total)]
        top = max(reference)
        mass = sum(np.exp(x - top) for x in reference)
        for j in range(own + 1):
            place = (i // QUERIES, j // KEYS)
            table[place] = max(table[place], np.exp(estimate[i, j] - top) / mass)
    return table


def rule(theta: float | list[list[float]], bits: int = 4, share: str = "each") -> Rule:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        heads, group = len(look.query), len(look.query) // len(look.key)
        query, key = (x.double().numpy() for x in (look.query, look.repeated))
        tables = [ratios(q, k, look.scale, bits) for q, k in zip(query, key, strict=True)]
        if share == "group_max":
            tables = [np.max(tables[head // group * group : (head // group + 1) * group], 0) for head in range(heads)]
        keep = np.zeros((heads, *tables[0].shape), bool)
        for head, table in enumerate(tables):
            above = theta if isinstance(theta, float) else theta[look.layer][head]
            keep[head] = table > above
            for row in range(len(table)):
                keep[head, row, sorted(must_read(row, look.new, look.total))] = True
        return blocks_to_tokens(torch.from_numpy(keep), QUERIES, KEYS, look.new, look.total)

    return reads


def own(**arguments: Any) -> Any:
    given = {"block": QUERIES, "key_block": KEYS, "sinks": SINKS, "near": NEAR, "theta": THETA, "length": 0}
    return policy("sale", **{**given, **arguments})


def heads_of_their_own(folder: Path) -> tuple[list[list[float]], str]:
    path = folder / "heads.json"
    table = [[0.1, 0.12, 0.0, 0.4], [0.1, 0.14, 0.05, 0.11], [0.0, 0.13, 0.3, 0.09]]
    path.write_text(json.dumps({"thresholds": table}))
    return table, str(path)


def test_heads_with_thresholds_of_their_own(tmp_path: Path) -> None:
    table, path = heads_of_their_own(tmp_path)
    engine = assert_equals_rule("llama", own(profile=path), rule(table), tmp_path)
    select = engine.plan.to_dict()["steps"][0]["select"]
    assert select["heads"] == table
    assert "profile" not in select


@pytest.mark.slow
@pytest.mark.parametrize(("family", "share"), [("llama", "each"), ("llama", "group_max"), ("llama-mqa", "group_max"),
                                               ("qwen3", "each"), ("gpt-neox", "each")])  # fmt: skip
def test_one_threshold(family: str, share: str, tmp_path: Path) -> None:
    assert_equals_rule(family, own(share=share), rule(THETA, share=share), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("length", [9, 16, 33])
def test_one_row_of_several_lengths(length: int, tmp_path: Path) -> None:
    assert_equals_rule("llama", own(), rule(THETA), tmp_path, calls=(length, 1, 7), padding=(0,))


@pytest.mark.slow
def test_no_threshold_is_dense(tmp_path: Path) -> None:
    assert_equals_rule("llama", own(theta=0.0), lambda look: None, tmp_path)


def cut(new: int, total: int, **more: Any) -> Any:
    query, key = look_alike(4, 2, new, total)
    return cut_of(3 * query, key, QUERIES, KEYS, **more)


def piece(bits: int = 4) -> EstimatedRatio:
    return EstimatedRatio(bits=bits, sinks=SINKS, local=NEAR)


def select(above: float, **more: Any) -> Threshold:
    return Threshold(above=above, sinks=SINKS, local=NEAR, **more)


SHAPES = [(40, 40), (23, 23), (13, 30), (3, 41), (5, 5), (1, 1)]


@pytest.mark.parametrize(("new", "total"), SHAPES)
@pytest.mark.parametrize("bits", [4, 2])
def test_ratings_are_the_formula(new: int, total: int, bits: int) -> None:
    given = cut(new, total)
    rating = piece(bits).emit(given)[0]
    for head in range(4):
        query, key = given.query[0, head].double().numpy(), given.key[0, head // 2].double().numpy()
        np.testing.assert_allclose(rating[head], ratios(query, key, given.scale, bits), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("new", "total"), SHAPES)
def test_many_bits_are_the_logits(new: int, total: int) -> None:
    """What was taken off queries and keys is back again: products of what was not rounded."""
    given = cut(new, total)
    rating = piece(16).emit(given)[0]
    for head in range(4):
        query, key = given.query[0, head].double().numpy(), given.key[0, head // 2].double().numpy()
        np.testing.assert_allclose(rating[head], ratios(query, key, given.scale, None), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize(("new", "total"), SHAPES)
@pytest.mark.parametrize("padding", [0, 8])
def test_a_threshold_of_zero_is_everything(new: int, total: int, padding: int) -> None:
    given = cut(new, total, padding=padding if padding < total else 0)
    read, _ = reading(given, piece(), select(0.0))
    assert bool((read | ~given.visible).all())
    if padding:  # blocks of padding near a row are listed, too
        return
    assert torch.equal(read, given.visible.expand_as(read))
    far = cut_of(300 * given.query, given.key, QUERIES, KEYS)  # most ratios are 0 in fp32
    read, _ = reading(far, piece(), select(0.0))
    assert torch.equal(read, far.visible.expand_as(read))


def test_a_threshold_above_all_leaves_what_must_be_read() -> None:
    read, _ = reading(cut(18, 57), piece(), select(1e23))
    for row in range(3):
        assert set(read[0, 0, row].nonzero().flatten().tolist()) == must_read(row, 18, 57)


def test_a_threshold_leaves_blocks_out() -> None:
    read, _ = reading(cut(40, 40), piece(), select(0.7))
    least, _ = reading(cut(40, 40), piece(), select(1e23))
    whole, _ = reading(cut(40, 40), piece(), select(0.0))
    assert int(least.sum()) < int(read.sum()) < int(whole.sum())


def test_zeros_have_codes() -> None:
    """Queries that are all alike, and keys: without their mean nothing is left."""
    query, key = look_alike(4, 2, 24, 24)
    for given in (cut_of(query[:, :, :1].expand(-1, -1, 24, -1), key, QUERIES, KEYS),
                  cut_of(query, key[:, :, :1].expand(-1, -1, 24, -1), QUERIES, KEYS)):  # fmt: skip
        rating = piece().emit(given)
        assert bool(torch.isfinite(rating).all())
    # Equal keys: every ratio is one over how many keys a query of the row has in its reference, at least.
    many = sum(j // KEYS in must_read(2, 24, 24) for j in range(17))
    torch.testing.assert_close(rating[0, :, 2, 0], torch.full((4,), 1 / many))


def test_what_is_refused(tmp_path: Path) -> None:
    _, path = heads_of_their_own(tmp_path)
    with pytest.raises(PolicyError, match="share no list"):
        build("llama", own(profile=path, share="group_max"), tmp_path)
    with pytest.raises(PolicyError, match="and a profile as well"):
        build("llama", own(profile=path, thresholds=[[0.1] * 4] * 3), tmp_path)
    with pytest.raises(PlanError, match="thresholds for 4 query heads in layer 0, not 2"):
        build("llama", own(thresholds=[[0.1] * 2] * 3), tmp_path)
    with pytest.raises(PlanError, match="thresholds for 4 query heads in layer 2, not 0"):
        build("llama", own(thresholds=[[0.1] * 4] * 2), tmp_path)
