"""PyramidKV against its formula: SnapKV with capacities that fall from layer to layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.test_snapkv import scores, top
from tests.decoders.oracle import Call, Rule
from tokcc.passes.budget import Count
from tokcc.passes.cache.selectors.layer_ramp import LayerRamp


def capacities(capacity: int, window: int, seen: int, layers: int, beta: int) -> list[int] | None:
    """The published arithmetic; what stays beside the window."""
    base = capacity - window
    if seen < capacity:
        return None
    if seen < 2 * base:
        return [base] * layers
    low = base // beta
    high = 2 * base - low
    if high >= seen - window:
        high = seen - window
        low = 2 * base - high
    step = (high - low) // (layers - 1)
    return [high - layer * step for layer in range(layers)]


def rule(capacity: int, window: int, beta: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        counts = capacities(capacity, window, call.seen, call.num_layers, beta)
        if call.new == 1 or counts is None or call.total <= counts[call.layer] + window:
            return None
        return top(scores(call, window, 3, "avg", "mean", "before_pool"), counts[call.layer], call.total)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "pyramidkv", "steps": [{"preset": "pyramidkv", "kernel": 3, **given}]}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    """Prompts that are long enough for the whole ramp, so that padding changes no capacity."""
    assert capacities(5, 2, 11, 3, 3) == capacities(5, 2, 14, 3, 3) == [5, 3, 1]
    engine = assert_equals_alone(
        family,
        policy(tokens=5, window=2, beta=3),
        rule(5, 2, 3),
        tmp_path,
        calls=(14, 1, 1, 5, *[1] * 24),
        padding=(0, 2, 3),
    )
    assert "different numbers of entries" in engine.plan.warnings[-1]


@pytest.mark.parametrize("prompt", [7, 9, 13])
def test_short_prompts(prompt: int, tmp_path: Path) -> None:
    """Nothing, the same in all layers, and a ramp that the prompt bounds; later text reaches the next regime."""
    calls = (prompt, 1, 1, 5, *[1] * 24)
    assert_equals_alone("llama", policy(tokens=8, window=2), rule(8, 2, 20), tmp_path, calls=calls, padding=(0, 0))


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path)


@pytest.mark.parametrize(
    ("capacity", "seen", "first", "last", "total"),
    [(128, 4000, 234, 17, 4016), (2048, 6000, 3978, 103, None), (128, 200, 120, 120, 3840)],
)
def test_known_values(capacity: int, seen: int, first: int, last: int, total: int | None) -> None:
    kept = []
    for layer in range(32):
        cut = cut_of(torch.zeros(1, 1, 1, 1), recent=8)
        cut.layer, cut.num_layers, cut.seen = layer, 32, seen
        kept.append(LayerRamp(recent=8).capacity(cut, Count("tokens", capacity)) - 8)
    assert kept == capacities(capacity, 8, seen, 32, 20)
    assert (kept[0], kept[-1]) == (first, last)
    assert total is None or sum(kept) == total
