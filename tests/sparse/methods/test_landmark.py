"""Landmark Attention: the softmax in groups written out token by token, and what is fetched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build, tokens
from tests.decoders.tiny import model_of
from tests.sparse.eager import EVERYTHING, cut_of, look_alike
from tests.sparse.engine import CALLS, policy
from tests.sparse.oracle import Look, Rule, run_sparse
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.sparse.selectors.closed_blocks import ClosedBlocks

TOKEN, BLOCK = 2, 7  # an id that texts do not have otherwise
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def landmark(layout: bool = False, **arguments: Any) -> dict[str, Any]:
    given = {"token": TOKEN, "block": BLOCK, "tokens": 2 * BLOCK, **arguments}
    return {**policy("landmark", **given), **(SLOTS if layout else {})}


def marked(ids: Tensor, padding: tuple[int, ...], first: int = 0) -> Tensor:
    """The same rows with a landmark at the end of each block; the first one may be shorter."""
    ids = ids.clone()
    for row, count in enumerate(padding):
        ids[row, count + BLOCK - 1 - first :: BLOCK] = TOKEN
    return ids


def weights(logits: Tensor, marks: list[bool], query: int, most: float) -> list[float]:
    """What one query gives to each key: logits ``[L]`` of one head."""
    number = [sum(marks[:j]) for j in range(len(marks))]
    own = [j for j in range(query + 1) if number[j] == number[query] and not marks[j]]
    closing = {number[j]: j for j in range(query) if marks[j]}
    best = sorted(closing, key=lambda block: -float(logits[closing[block]]))
    read = [closing[block] for block in best if best.index(block) < most]
    exps = [math.exp(float(logit)) for logit in logits]
    main = sum(exps[j] for j in (*own, *read))
    found = [0.0] * len(marks)
    for j in own:
        found[j] = exps[j] / main
    for close in read:
        members = [j for j in range(close) if number[j] == number[close]]
        for j in members:
            found[j] = exps[close] / main * exps[j] / sum(exps[i] for i in members)
    return found


def grouped_rule(ids: Tensor, most: float, share: str = "each") -> Rule:
    def rule(look: Look) -> Tensor:
        marks = (ids[: look.total] == TOKEN).tolist()
        past = look.total - look.new
        made = torch.zeros(look.query.shape[0], look.new, look.total, dtype=torch.float64)
        groups = look.query.shape[0] // look.key.shape[0]
        for head in range(len(made)):
            for row in range(look.new):
                logits = look.logits[head, row]
                if share == "group_max":
                    # What is read is chosen by all heads of the group; what it weighs is each one's own.
                    mates = [h for h in range(len(made)) if h // groups == head // groups]
                    best = look.logits[mates, row].amax(0)
                    places = [j for j in range(past + row) if marks[j]]
                    chosen = sorted(places, key=lambda j: -float(best[j]))[: int(most)]
                    logits = logits.clone()
                    logits[[j for j in places if j not in chosen]] = -1e4
                made[head, row] = torch.tensor(weights(logits, marks, past + row, most))
        torch.testing.assert_close(made.sum(-1), torch.ones(made.shape[:2], dtype=torch.float64))
        return made

    return rule


def compare(
    family: str, wanted: dict[str, Any], folder: Path, most: float, *, padding: tuple[int, ...] = (0, 3, 5),
    share: str = "each", first: int = 0,
) -> None:  # fmt: skip
    engine = build(family, wanted, folder)
    ids, mask = tokens(len(padding), sum(CALLS), padding)
    ids = marked(ids, padding, first)
    logits, last = engine.run(ids, mask, CALLS)
    for row, count in enumerate(padding):
        text = ids[row, count:]
        lengths = [CALLS[0] - count, *CALLS[1:]]
        alone = run_sparse(model_of(family), text, lengths, grouped_rule(text, most, share)).numpy()
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=2e-4 * float(np.abs(alone).max()))
        marks = last["present.1.key_marks"][row, 0, count : sum(CALLS), 0]
        np.testing.assert_array_equal(marks, (text == TOKEN).float())


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama-mqa", "gpt2"))])
@pytest.mark.parametrize("layout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equals_the_formula(family: str, layout: bool, tmp_path: Path) -> None:
    """Rows whose blocks begin anywhere, in a prompt, single tokens and a further piece of the text."""
    compare(family, landmark(layout), tmp_path, 2)


@pytest.mark.parametrize("layout", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_blocks_are_the_function_that_was_trained(layout: bool, tmp_path: Path) -> None:
    compare("llama", landmark(layout, tokens=10**6), tmp_path, math.inf)


@pytest.mark.slow
def test_one_row_and_a_first_block_that_is_shorter(tmp_path: Path) -> None:
    compare("llama", landmark(True), tmp_path, 2, padding=(0,), first=4)


@pytest.mark.slow
def test_heads_that_share_a_choice(tmp_path: Path) -> None:
    compare("llama", landmark(share="group_max"), tmp_path, 2, share="group_max")


def test_one_block_is_plain_attention(tmp_path: Path) -> None:
    engine = build("llama", landmark(block=64), tmp_path)
    ids, mask = tokens(2, sum(CALLS), (0, 3))
    logits, _ = engine.run(ids, mask, CALLS)
    for row, count in ((0, 0), (1, 3)):
        alone = run_sparse(model_of("llama"), ids[row, count:], [CALLS[0] - count, *CALLS[1:]], lambda look: None)
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=2e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_weights_sum_to_one(single: bool, size: float) -> None:
    """Also where blocks differ in their logits by more than an exponential bears."""
    query, key = look_alike(4, 2, 40, 40)
    ids = marked(torch.ones(1, 40, dtype=torch.int64), (0,))
    states = {"key_marks": (ids == TOKEN).float()[:, None, :, None]}
    cut = cut_of(query * size, key, 1, BLOCK, states=states)
    cut = replace(cut, value=torch.ones_like(key))
    made = ClosedBlocks(token=TOKEN).attended(cut.of_last() if single else cut, None, EVERYTHING)
    assert made.shape == (1, 4, 1 if single else 40, 8)
    torch.testing.assert_close(made, torch.ones_like(made))


@pytest.mark.parametrize(
    ("blocks", "select", "message"),
    [
        ({"query": 1, "key": BLOCK}, {}, "select"),
        ({"query": 1, "key": 1}, {"token": TOKEN}, "a closing token and others"),
        ({"query": 4, "key": BLOCK}, {"token": TOKEN}, "a closing token and others"),
        ({"query": 1, "key": BLOCK}, {"token": TOKEN, "sinks": 1}, "as they are"),
    ],
)
def test_what_is_refused(blocks: dict[str, int], select: dict[str, int], message: str, tmp_path: Path) -> None:
    step = {"node": "sparse_attention", "blocks": blocks, "select": {"kind": "closed_blocks", **select}}
    with pytest.raises((PlanError, PolicyError), match=message):
        build("llama", {"version": 1, "name": "own", "steps": [{**step, "budget": {"tokens": 14}}]}, tmp_path)


def test_a_landmark_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="token"):
        build("llama", policy("landmark"), tmp_path)
