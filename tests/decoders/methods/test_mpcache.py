"""The static stage of MPCache against its formula: the highest attention from the last part of a prompt."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.scores.window_peak import WindowPeak
from tokcc.passes.methods import library

CALLS = (9, 1, 1, 5, *[1] * 64)


def rule(capacity: int, recent: int, share: str) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1 or call.total <= capacity:
            return None
        asking = range(call.new - math.ceil(Fraction(share) * call.new), call.new)
        heads = len(call.probs)
        peaks = [
            max(sum(float(call.probs[h, i, j]) for h in range(heads)) / heads for i in asking)
            for j in range(call.total)
        ]
        return best(torch.tensor([peaks] * call.key.shape[0], dtype=torch.float64), capacity, recent=recent)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "mpcache", "steps": [{"preset": "mpcache", **given}]}


@pytest.mark.parametrize(
    ("family", "tokens", "recent", "share"),
    [("llama", 6, 2, "0.2"), ("llama", 4, 0, "0.5"), ("qwen2", 7, 3, "1.0"), ("gpt-neox", 6, 2, "0.3")],
)
def test_equals_the_formula(family: str, tokens: int, recent: int, share: str, tmp_path: Path) -> None:
    """Rows of different lengths have different numbers of queries that rate."""
    given = policy(tokens=tokens, recent=recent, share=float(share))
    assert_equals_alone(family, given, rule(tokens, recent, share), tmp_path, calls=CALLS)


def test_one_row(tmp_path: Path) -> None:
    given = policy(tokens=6, recent=2)
    assert_equals_alone("llama", given, rule(6, 2, "0.2"), tmp_path, padding=(0,), calls=CALLS)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, calls=CALLS)


def test_the_number_of_queries_is_each_rows_own() -> None:
    """10 tokens have 2 that rate, 5 of them one."""
    generator = torch.Generator().manual_seed(1)
    cut = cut_of(torch.randn(2, 2, 10, 8, generator=generator), padding=(0, 5))
    peaks = WindowPeak(share=0.2).emit(cut)
    probs = cut.probs(2).mean(2).mean(1)  # [2, 2, 10]
    torch.testing.assert_close(peaks[0, 0], probs[0].amax(0))
    torch.testing.assert_close(peaks[1, 0], probs[1, 1])


def test_bad_parameters_are_refused() -> None:
    program = program_of("llama")
    for given, error, match in (
        ({"share": 0.0}, PolicyError, "share"),
        ({"tokens": 16}, PlanError, "protected"),
    ):
        loaded = load_policy(policy(**given), presets=library())
        with pytest.raises(error, match=match):
            make_cache_plan(loaded, program, cache_sites(program))
    with pytest.raises(PolicyError, match="share"):
        load_policy(policy(share=1.5), presets=library())
