"""H2O against its formula: accumulated column sums, heavy hitters and recent tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule


def rule(capacity: int, recent: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        fresh = call.grouped.sum(2).mean(1)  # [Hkv, L]
        before = call.memory.values.get("score", torch.zeros(call.key.shape[0], 0))
        fresh[:, : before.shape[1]] += before
        keep = best(fresh, capacity, recent=recent)
        rows = torch.arange(len(fresh))[:, None]
        call.memory.values["score"] = fresh if keep is None else fresh[rows, keep]
        return keep

    return evict


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt-neox", "falcon"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    policy = {"version": 1, "name": "h2o", "steps": [{"preset": "h2o", "tokens": 12}]}
    engine = assert_equals_alone(family, policy, rule(12, 6), tmp_path)
    assert engine.program.output_names[-1] == "present.2.key_score"


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    policy = {"version": 1, "name": "h2o", "steps": [{"preset": "h2o", "tokens": 200}]}
    assert_equals_alone("llama", policy, None, tmp_path)


def test_split_budget(tmp_path: Path) -> None:
    budget = {"kv": {"sinks": 2, "recent": 3, "heavy": 4}}
    policy = {"version": 1, "name": "h2o", "steps": [{"preset": "h2o", "budget": budget}]}

    def evict(call: Call) -> Tensor | None:
        fresh = call.grouped.sum(2).mean(1)
        before = call.memory.values.get("score", torch.zeros(call.key.shape[0], 0))
        fresh[:, : before.shape[1]] += before
        keep = best(fresh, 9, sinks=2, recent=3)
        rows = torch.arange(len(fresh))[:, None]
        call.memory.values["score"] = fresh if keep is None else fresh[rows, keep]
        return keep

    assert_equals_alone("llama", policy, evict, tmp_path)
