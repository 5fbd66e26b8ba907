"""KeyDiff against its formula: the keys least like the mean of all normalised keys stay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tokcc.passes.cache.scores.key_difference import KeyDifference


def length(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def rule(capacity: int, sinks: int = 0, recent: int = 0) -> Rule:
    def evict(call: Call) -> Tensor | None:
        scores = []
        for head in call.key.double():
            unit = [key / max(length(key), 1e-12) for key in head]
            anchor = torch.zeros_like(head[0])
            for key in unit:
                anchor = anchor + key / len(unit)
            scores.append([-float((key * anchor).sum()) / max(length(anchor), 1e-12) for key in unit])
        return best(torch.tensor(scores, dtype=torch.float64), capacity, sinks=sinks, recent=recent)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "keydiff", "steps": [{"preset": "keydiff", **given}]}


@pytest.mark.parametrize(("family", "tokens"), [("llama", 12), ("llama", 7), ("qwen3", 12), ("gpt2", 12)])
def test_equals_the_formula(family: str, tokens: int, tmp_path: Path) -> None:
    assert_equals_alone(family, policy(tokens=tokens), rule(tokens), tmp_path)


def test_protected_tokens(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=8, sinks=1, recent=3), rule(8, 1, 3), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path)


def test_the_length_of_a_key_says_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 9, 8, generator=generator)
    factor = torch.rand(1, 2, 9, 1, generator=generator) + 0.1
    wanted = KeyDifference().emit(cut_of(key))
    torch.testing.assert_close(KeyDifference().emit(cut_of(key * factor)), wanted)
