"""StreamingLLM: sinks and recent tokens, with positions counted inside the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone, build
from tests.decoders.oracle import Call, Rule
from tokcc.errors import PlanError


def rule(capacity: int, sinks: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.total <= capacity:
            return None
        recent = range(call.total - (capacity - sinks), call.total)
        return torch.tensor([*range(sinks), *recent]).expand(call.key.shape[0], -1)

    return evict


def policy(tokens: int, **keys: object) -> dict[str, object]:
    return {"version": 1, "name": "s", "steps": [{"preset": "streaming-llm", "tokens": tokens, **keys}]}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt-neox"])
def test_equals_turning_the_cached_keys(family: str, tmp_path: Path) -> None:
    assert_equals_alone(family, policy(12), rule(12, 4), tmp_path, slots=True)


def test_true_positions(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(12, positions="keep"), rule(12, 4), tmp_path)


def test_no_sinks_is_warned_of(tmp_path: Path) -> None:
    engine = build("llama", policy(12, sinks=0), tmp_path)
    assert any("evicts the first tokens" in warning for warning in engine.plan.warnings)


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be counted anew"):
        build("gpt2", policy(12), tmp_path)
