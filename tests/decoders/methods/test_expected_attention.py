"""Expected attention against its formula, written with loops over positions and entries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tests.decoders.queries import heard_queries, rotated
from tests.decoders.tiny import model_of
from tokcc.passes.cache.scores.expected_attention import ExpectedAttention

CALLS = (14, 1, 1, 5, *[1] * 64)


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "expected", "steps": [{"preset": "expected-attention", **given}]}


def mean_rotation(family: str, width: int, start: int, ahead: int) -> Tensor:
    """``[D, D]``, for column vectors."""
    units = torch.eye(width)
    turned = [rotated(model_of(family), units, start + t) for t in range(1, ahead + 1)]
    return torch.stack(turned).double().mean(0).T


def scores(family: str, call: Call, queries: Tensor, sinks: int, ahead: int, *, spread: bool, values: bool) -> Tensor:
    """fp32 ``[Hkv, L]`` from the queries ``[H, S, D]``."""
    first = call.seen - call.new
    used = queries[:, max(sinks - first, 0) :].double()
    heads, _, width = used.shape
    turn = mean_rotation(family, width, call.seen - 1, ahead)
    groups = heads // call.key.shape[0]
    result = torch.zeros(call.key.shape[0], call.total, dtype=torch.float64)
    for head in range(heads):
        key = call.key[head // groups].double()
        mean = used[head].mean(0) if used.shape[1] else torch.zeros(width, dtype=torch.float64)
        logits = key @ (turn @ mean) / width**0.5
        if spread and used.shape[1]:
            apart = used[head] - mean
            covariance = turn @ (apart.T @ apart / len(apart)) @ turn.T
            for j in range(call.total):
                logits[j] += key[j] @ covariance @ key[j] / (2 * width)
        result[head // groups] += torch.softmax(logits, 0) / groups
    if values:
        result *= call.value.double().norm(dim=2)
    return result.float()


def rule(family: str, heard: dict[int, Tensor], capacity: int, sinks: int, ahead: int, **how: bool) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1:
            return None
        return best(scores(family, call, heard[call.layer], sinks, ahead, **how), capacity, sinks=sinks)

    return evict


@pytest.mark.parametrize(
    ("family", "spread", "values"),
    [("llama", True, True), ("qwen3", True, True), ("llama", False, False), ("gpt2", True, False)],
)
def test_equals_the_formula(family: str, spread: bool, values: bool, tmp_path: Path) -> None:
    given = policy(tokens=9, sinks=2, ahead=17, covariance=spread, values=values)
    with heard_queries(model_of(family)) as heard:
        expected = rule(family, heard, 9, 2, 17, spread=spread, values=values)
        assert_equals_alone(family, given, expected, tmp_path, calls=CALLS)


def test_one_row_and_a_budget_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, calls=CALLS, padding=(0,))


def test_one_query_without_spread_is_its_attention() -> None:
    """No rotation, no values: the softmax of the mean query."""
    cut = cut_of(torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(1)), new=1)
    cut.unturned = cut.query
    score = ExpectedAttention(covariance=False, values=False).emit(cut)
    torch.testing.assert_close(score, cut.received)
