"""Reading with two engines, on engines whose answers are known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokcc.pipeline import decoder_speed, reading
from tokcc.pipeline.decoder_speed import Limits, break_even, grow, reached
from tokcc.pipeline.needles import CUE, LENGTH, plant, usual_tokens
from tokcc.pipeline.occupancy import prompt_length
from tokcc.pipeline.reading import Reading
from tokcc.report.schema import Spread

VOCABULARY = 5000


class Copier:
    """Answers with what came after the latest copy of two tokens in its cache, which holds the last tokens only.

    Args:
        window: How many; None = all.
        rows: Whether it gives the logits of all tokens.
        clock: Goes on with every token.
    """

    batch = None

    def __init__(self, window: int | None, *, rows: bool = True, clock: list[float] | None = None) -> None:
        self.window, self.rows, self.clock = window, rows, clock
        self.calls: list[int] = []

    def empty_past(self, batch: int) -> dict[str, Any]:
        return {"past_key_values.0.key": np.zeros((batch, 1, 0, 1), np.int64)}

    def read(self, ids: Any, mask: Any, positions: Any, past: Any) -> tuple[Any, dict[str, Any]]:
        assert mask.shape[1] == positions[0, -1] + 1
        self.calls.append(ids.shape[1])
        if self.clock is not None:
            self.clock[0] += ids.shape[1]
        known = past["past_key_values.0.key"][0, 0, :, 0].tolist()
        logits = np.zeros((ids.shape[0], ids.shape[1], VOCABULARY), np.float32)
        for place, token in enumerate(ids[0].tolist()):
            text = [*known, *ids[0, :place].tolist(), token]
            for last in range(len(text) - 2, 0, -1):
                if text[last - 1 : last + 1] == text[-2:]:
                    logits[:, place, text[last + 1]] = 1
                    break
        kept = np.array(known + ids[0].tolist())[-self.window if self.window else None :]
        cache = np.broadcast_to(kept[None, None, :, None], (ids.shape[0], 1, len(kept), 1)).copy()
        return (logits if self.rows else logits[:, -1:]), {"past_key_values.0.key": cache}


def run(after: Copier, contexts: tuple[int, ...] = (512, 1024), **options: Any) -> Any:
    ids = np.random.default_rng(0).permutation(VOCABULARY)[: contexts[-1]]
    options = {"limits": Limits(runs=1), "weights": (1000, 800), **options}
    return grow(Copier(None), after, ids, contexts, vocabulary=VOCABULARY, **options)


@pytest.mark.parametrize("rows", [True, False])
def test_needles_in_a_window(rows: bool) -> None:
    """A cache of the last 200 tokens still has the needles that lie in them, and no other."""
    found = run(Copier(200, rows=rows))
    assert [(p.context, p.depth) for p in found.needles][:5] == [(512, d) for d in (0.1, 0.25, 0.5, 0.75, 0.9)]
    asked = LENGTH - CUE
    for point in found.needles:
        assert (point.predictions, point.hits_before) == (asked, asked)
        assert point.hits_after == (asked if point.position >= point.context - 200 else 0)
    assert {p.hits_after for p in found.needles} == {0, asked}


def test_what_is_read_and_held() -> None:
    engine = Copier(200)
    found = run(engine, (300, 700), batch=2)
    assert [p.cache_bytes_before for p in found.points] == [2 * 300 * 8, 2 * 700 * 8]
    assert [p.cache_bytes_after for p in found.points] == [2 * 200 * 8] * 2
    assert found.points[1].bound == pytest.approx((1000 + 11200) / (800 + 3200))
    assert found.before["past_key_values.0.key"].shape == (2, 1, 700, 1)
    assert [n for n in engine.calls if n not in (1, LENGTH)] == [256, 44, 256, 144]


def test_needles_of_several_contexts_do_not_overlap() -> None:
    ids = np.zeros(8192, np.int64)
    made = plant(ids, (512, 1024, 2048, 4096, 8192), 50000, np.random.default_rng(0))
    starts = sorted({start for places in made.places.values() for _, start in places})
    assert min(np.diff(starts)) >= LENGTH
    assert all(start + LENGTH <= context for context, places in made.places.items() for _, start in places)
    assert all(len(places) >= 4 for places in made.places.values())
    assert not ids.any()
    assert plant(ids, (130,), 50000, np.random.default_rng(0)).places[130][-1] == (0.9, 130 - LENGTH)
    assert plant(ids, (64,), 50000, np.random.default_rng(0)).places == {64: ()}


def test_tokens_do_not_come_twice_before_all_have_come() -> None:
    rng = np.random.default_rng(0)
    drawn = usual_tokens(49152, 2048, rng)
    assert len(set(drawn.tolist())) == 2048
    assert drawn.min() >= 384
    assert drawn.max() < 3072
    assert sorted(usual_tokens(10, 20, rng).tolist()) == sorted([*range(10)] * 2)


def test_time_ends_the_growth() -> None:
    """Each token takes a second of a made-up clock: 1024 do not fit any more, and 2048 are not tried."""
    now = [0.0]
    after = Copier(100, clock=now)
    found = run(after, (256, 512, 1024, 2048), limits=Limits(budget_s=1000, runs=1), clock=lambda: now[0])
    assert [p.context for p in found.points] == [256, 512]
    assert found.points[0].first_token_after == 256
    assert found.points[1].first_token_after == 512
    assert found.context == 512
    assert "up to a context of 512 tokens: 1024 do not fit into 1000 seconds" in found.notes[0]
    assert found.after["past_key_values.0.key"].shape[2] == 100


def test_the_first_context_is_measured_whatever_it_takes() -> None:
    found = run(Copier(100), (256, 512), limits=Limits(budget_s=0.0, runs=1))
    assert [p.context for p in found.points] == [256]


def test_break_even() -> None:
    def points(*ratios: float) -> list[tuple[int, Spread]]:
        return [(2**i, Spread(median=r, p10=r, p90=r)) for i, r in enumerate(ratios)]

    assert break_even(points(0.9, 1.1, 1.3)) == 2
    assert break_even(points(1.2, 0.9, 1.3)) == 4
    assert break_even(points(1.2, 1.1)) == 1
    assert break_even(points(1.2, 0.9)) is None
    assert break_even([]) is None


def test_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (512, 1024))
    assert reached(None) == (512, 1024)
    assert reached(1024) == (512,)
    assert reached(1025) == (512, 1024)
    assert reached(300) == (299,)


def test_prompts_are_longer_than_the_cache() -> None:
    def cache(slots: int) -> dict[str, Any]:
        return {"past_key_values.0.key": np.zeros((1, 2, slots, 4)), "past_key_values.0.value": np.zeros((1, 2, 9, 4))}

    assert prompt_length(cache(512), 8192, 49152) == 1024
    assert prompt_length(cache(4096), 8192, 49152) == 2048
    assert prompt_length(cache(512), 700, 49152) == 700
    assert prompt_length(cache(1024), 8192, 262144) == 1024


def test_branches_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 4)
    one = Reading(Copier(None))
    one.read(np.arange(5))
    other = one.branch()
    other.read(np.arange(3))
    assert (one.seen, other.seen) == (5, 8)
    assert one.cache_bytes == 5 * 8
    assert one.peek(np.array([1, 2])).argmax(-1).tolist() == [0, 3]
    assert one.seen == 5
