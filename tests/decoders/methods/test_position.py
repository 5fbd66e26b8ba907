"""The score by position in long form: sinks and the newest tokens, at their true positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.oracle import Call, Rule


def rule(capacity: int, sinks: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        total = call.total
        if total <= capacity:
            return None
        kept = [*range(sinks), *range(total - (capacity - sinks), total)]
        return torch.tensor([kept] * call.key.shape[0])

    return evict


def policy(tokens: int, sinks: int) -> dict[str, object]:
    step = {
        "node": "evict_kv",
        "score": "position",
        "select": {"kind": "best", "sinks": sinks},
        "budget": {"tokens": tokens},
    }
    return {"version": 1, "name": "recent", "steps": [step]}


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    engine = assert_equals_alone(family, policy(8, 3), rule(8, 3), tmp_path)
    assert not engine.plan.warnings


def test_without_sinks(tmp_path: Path) -> None:
    engine = assert_equals_alone("llama", policy(8, 0), rule(8, 0), tmp_path)
    assert "evicts the first tokens" in engine.plan.warnings[0]


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(200, 4), None, tmp_path)
