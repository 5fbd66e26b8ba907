"""DapQ: the window's queries, turned to the positions behind the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.rules import best
from tests.decoders.methods.test_snapkv import smoothed
from tests.decoders.oracle import Call, Rule
from tests.decoders.queries import heard_queries, rotated
from tests.decoders.tiny import model_of

CALLS = (14, 1, 1, 5, *[1] * 64)
WINDOW, KERNEL, SINKS = 4, 3, 1


def policy(**given: object) -> dict[str, object]:
    step = {"preset": "dapq", "window": WINDOW, "kernel": KERNEL, "sinks": SINKS, **given}
    return {"version": 1, "name": "dapq", "steps": [step]}


def rule(family: str, heard: dict[int, Tensor], capacity: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1:
            return None
        queries = heard[call.layer]
        kv_heads = call.key.shape[0]
        groups = len(queries) // kv_heads
        rows = range(max(0, call.new - WINDOW), call.new)
        result = torch.zeros(kv_heads, call.total)
        for head, query in enumerate(queries):
            key = call.key[head // groups]
            for i in rows:
                position = call.seen - call.new + i + WINDOW
                turned = rotated(model_of(family), query[i], position)
                result[head // groups] += torch.softmax(key @ turned / key.shape[1] ** 0.5, 0) / groups
        made = torch.tensor([smoothed(row.tolist(), KERNEL, "avg") for row in result])
        return best(made, capacity, sinks=SINKS, recent=WINDOW)

    return evict


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    with heard_queries(model_of(family)) as heard:
        assert_equals_alone(family, policy(tokens=9), rule(family, heard, 9), tmp_path, calls=CALLS)


def test_one_row_and_a_budget_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, calls=CALLS, padding=(0,))
