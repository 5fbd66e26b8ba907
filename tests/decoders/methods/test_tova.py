"""TOVA against its formula: the token that the last query attends to least, one set for all heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.oracle import Call, Rule


def rule(capacity: int, sinks: int = 0, recent: int = 0) -> Rule:
    def evict(call: Call) -> Tensor | None:
        heads, last, total = len(call.probs), call.new - 1, call.total
        if total <= capacity:
            return None
        worth = [sum(float(call.probs[h, last, j]) for h in range(heads)) / heads for j in range(total)]
        always = [j for j in range(total) if j < sinks or j >= total - recent]
        others = sorted((j for j in range(total) if j not in always), key=lambda j: (-worth[j], j))
        kept = sorted(always + others[: capacity - len(always)])
        return torch.tensor([kept] * call.key.shape[0])

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "tova", "steps": [{"preset": "tova", **given}]}


@pytest.mark.parametrize(("family", "tokens"), [("llama", 12), ("llama", 7), ("gpt2", 12), ("falcon", 12)])
def test_equals_the_formula(family: str, tokens: int, tmp_path: Path) -> None:
    assert_equals_alone(family, policy(tokens=tokens), rule(tokens), tmp_path)


def test_protected_tokens(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=8, sinks=2, recent=1), rule(8, 2, 1), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path)
