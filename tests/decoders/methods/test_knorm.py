"""L2 norm of keys against its formula: the shortest keys stay."""

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
from tokcc.passes.cache.scores.key_norm import KeyNorm
from tokcc.passes.cache.selectors.best import Best


def rule(capacity: int, first_layer: int, recent: int = 0) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.layer < first_layer:
            return None
        norms = [[math.sqrt(sum(float(x) ** 2 for x in key)) for key in head] for head in call.key]
        return best(-torch.tensor(norms, dtype=torch.float64), capacity, recent=recent)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "knorm", "steps": [{"preset": "knorm", **given}]}


def test_the_first_two_layers_keep_everything(tmp_path: Path) -> None:
    engine = assert_equals_alone("llama", policy(tokens=7), rule(7, 2), tmp_path)
    assert [eviction.layer for eviction in engine.plan.evictions] == [2]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    given = policy(tokens=12, recent=2, at={"layers": "all"})
    assert_equals_alone(family, given, rule(12, 0, 2), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200, at={"layers": "all"}), None, tmp_path)


def test_ties_go_to_the_older_entry() -> None:
    """Keys of equal length, one longer one, and a row with padding."""
    key = torch.ones(2, 1, 6, 4)
    key[:, :, 2] = 3.0
    cut = cut_of(key, capacity=3, padding=(0, 2))
    index = Best().select(cut, KeyNorm().emit(cut)).index
    assert index.tolist() == [[[0, 1, 3]], [[3, 4, 5]]]


def test_rotations_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 20, 8, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    kept = [Best().select(cut, KeyNorm().emit(cut)).index for cut in (cut_of(k, capacity=7) for k in (key, key @ turn))]
    assert torch.equal(*kept)
