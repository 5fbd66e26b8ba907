"""Prompts in one call, on engines that take as long as they are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokcc.pipeline.decoder_speed import Limits
from tokcc.pipeline.whole_prompts import Prompts, time_prompts


class Slow:
    """Takes so many made-up seconds for a prompt; `seconds` maps its length to them."""

    batch = None

    def __init__(self, clock: list[float], seconds: Any) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, []

    def empty_past(self, batch: int) -> dict[str, Any]:
        return {"past_key_values.0.key": np.zeros((batch, 1, 0, 1), np.float32)}

    def read(self, ids: Any, mask: Any, positions: Any, past: Any) -> tuple[Any, Any]:
        assert past["past_key_values.0.key"].shape[2] == 0
        assert mask.shape == ids.shape
        self.calls.append(ids.shape)
        self.clock[0] += self.seconds(ids.shape[1])
        return np.zeros((*ids.shape, 3), np.float32), past


def run(dense: Any, sparse: Any, lengths: tuple[int, ...], **options: Any) -> tuple[Prompts, Slow]:
    clock = [0.0]
    one, two = Slow(clock, dense), Slow(clock, sparse)
    limits = Limits(**{"budget_s": 1e6, "runs": 3, **options.pop("limits", {})})
    ids = np.arange(lengths[-1])
    return time_prompts(one, two, ids, lengths, limits=limits, clock=lambda: clock[0], **options), two


def test_every_length_is_one_call() -> None:
    found, engine = run(lambda n: n**2, lambda n: 10 * n, (4, 8, 16), batch=2)
    assert [p.tokens for p in found.points] == [4, 8, 16]
    assert [p.seconds_before for p in found.points] == [16, 64, 256]
    assert [p.speedup.median for p in found.points] == pytest.approx([0.4, 0.8, 1.6])
    assert engine.calls == [(2, 4)] * 4 + [(2, 8)] * 3 + [(2, 16)] * 3  # one untimed call in front
    assert found.longest == 16
    assert found.timed.timing("engine").median == 160
    assert found.notes == ()


def test_time_ends_it() -> None:
    """Three rounds of 8 would take up to 3 * (64 + 80) seconds after the first length."""
    found, _ = run(lambda n: n**2, lambda n: 10 * n, (4, 8, 16), limits={"budget_s": 300.0})
    assert [p.tokens for p in found.points] == [4]
    assert "up to 4 tokens: 8 may not fit into 300 seconds" in found.notes[0]


def test_the_first_length_is_measured_whatever_it_takes() -> None:
    found, _ = run(lambda n: n**2, lambda n: n, (64, 128), limits={"budget_s": 0.0})
    assert [p.tokens for p in found.points] == [64]
