from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokcc.errors import UsageError
from tokcc.report.measure import Measured, measure, spread_of, timing_of


class FakeTime:
    """A clock that only moves when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run


def run(clock: FakeTime, a: float = 0.2, b: float = 0.1, **options: object) -> Measured:
    jobs = {"a": clock.job("a", a), "b": clock.job("b", b)}
    return measure(jobs, clock=clock, **options)  # type: ignore[arg-type]  # options of several types


def test_rounds_fill_the_time_budget() -> None:
    clock = FakeTime()
    measured = run(clock, budget_s=3.0, warmup=2)
    assert measured.runs == 10
    assert measured.warmup == 2
    assert measured.timing("a").median == pytest.approx(0.2)
    assert measured.speedup("a", "b").median == pytest.approx(2.0)


def test_every_round_runs_each_candidate_once_in_a_seeded_order() -> None:
    first, second, third = FakeTime(), FakeTime(), FakeTime()
    run(first, budget_s=30.0, warmup=0, seed=1)
    run(second, budget_s=30.0, warmup=0, seed=1)
    run(third, budget_s=30.0, warmup=0, seed=2)
    rounds = set(zip(first.log[::2], first.log[1::2], strict=True))
    assert rounds == {("a", "b"), ("b", "a")}
    assert first.log == second.log != third.log


def test_a_slow_model_still_gets_the_least_number_of_rounds_and_one_warm_up() -> None:
    measured = run(FakeTime(), a=50.0, b=40.0, budget_s=1.0, warmup=5, min_rounds=3)
    assert measured.runs == 3
    assert measured.warmup == 1


def test_a_fast_model_stops_at_the_largest_number_of_rounds() -> None:
    assert run(FakeTime(), a=0.0, b=0.0, max_rounds=11).runs == 11


def test_drift_of_the_machine_does_not_reach_the_ratio() -> None:
    clock, slowdown = FakeTime(), itertools.count()

    def drifting(seconds: float) -> Callable[[], None]:
        def go() -> None:
            clock.now += seconds * (1 + next(slowdown) / 100)

        return go

    measured = measure({"a": drifting(0.2), "b": drifting(0.1)}, clock=clock, budget_s=10.0)
    assert measured.speedup("a", "b").median == pytest.approx(2.0, rel=0.02)
    assert measured.timing("a").p90 > measured.timing("a").p10 * 1.2


def test_the_collector_is_off_while_timing_and_on_again_after_a_failure() -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure({"a": fail})
    assert seen == [False]
    assert gc.isenabled()


def test_progress_is_reported() -> None:
    ticks: list[int] = []
    run(FakeTime(), max_rounds=7, on_round=ticks.append)
    assert ticks == list(range(1, 8))


def test_mistakes_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure({})
    with pytest.raises(UsageError, match="numbers of rounds"):
        measure({"a": lambda: None}, min_rounds=5, max_rounds=4)


def test_latency_section() -> None:
    measured = run(FakeTime(), budget_s=3.0)
    latency = measured.latency("a", "b", threads=2, shapes={"x": [1, 3]}, runtime="fake", batch_size=1)
    assert latency.runs == measured.runs == len(latency.baseline.samples)
    assert latency.interleaved
    assert latency.shapes == {"x": (1, 3)}


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_percentiles_agree_with_numpy(values: list[float]) -> None:
    timing = timing_of(values)
    assert timing.median == pytest.approx(np.median(values))
    assert timing.p10 <= timing.median <= timing.p90
    ones = spread_of(values, values)
    assert (ones.p10, ones.median, ones.p90) == (1, 1, 1)


def test_runs_below_the_clocks_resolution_give_a_finite_ratio() -> None:
    assert spread_of([0.0], [0.0]).median == 1.0
