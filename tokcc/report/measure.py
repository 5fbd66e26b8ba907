"""Interleaved timing: the candidates take turns, so that a machine that slows down slows all of them down.

Comparing medians of two separate loops compares two moments of the machine. Here every round runs each candidate once,
in a random order (a seeded shuffle, so that no candidate is always the one with a warm or a cold cache), and the ratio
is taken within the round.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.schema import Latency, Spread, Timing

__all__ = ["Measured", "measure", "spread_of", "timed_seconds", "timing_of"]

TIMED_SECONDS = 10.0


def timed_seconds() -> float:
    """Return how long what is compiled is timed, where nobody says otherwise."""
    return TIMED_SECONDS


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` saw.

    Attributes:
        samples: Seconds of every timed run by candidate; entry ``i`` of each belongs to round ``i``.
        warmup: Untimed runs of each candidate before.
        seed: Seed of the order within a round.
    """

    samples: Mapping[str, tuple[float, ...]]
    warmup: int
    seed: int

    @property
    def runs(self) -> int:
        """Number of rounds: timed runs of each candidate."""
        return len(next(iter(self.samples.values())))

    def timing(self, name: str) -> Timing:
        """Median, p10 and p90 of one candidate, with all samples."""
        return timing_of(self.samples[name])

    def speedup(self, baseline: str, engine: str) -> Spread:
        """Baseline / engine of each round: above 1 the engine is faster."""
        return spread_of(self.samples[baseline], self.samples[engine])

    def latency(
        self,
        baseline: str,
        engine: str,
        *,
        threads: int,
        shapes: Mapping[str, Sequence[int]],
        runtime: str,
        batch_size: int | None = None,
    ) -> Latency:
        """Return the report's latency section for two of the candidates."""
        return Latency(
            baseline=self.timing(baseline),
            engine=self.timing(engine),
            speedup=self.speedup(baseline, engine),
            runs=self.runs,
            warmup=self.warmup,
            interleaved=True,
            seed=self.seed,
            threads=threads,
            shapes={name: tuple(shape) for name, shape in shapes.items()},
            runtime=runtime,
            batch_size=batch_size,
        )


def timing_of(samples: Sequence[float]) -> Timing:
    """Summarise the seconds of one candidate."""
    p10, median, p90 = np.percentile(np.asarray(samples, dtype=np.float64), [10, 50, 90])
    return Timing(median=float(median), p10=float(p10), p90=float(p90), samples=tuple(samples))


def spread_of(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Summarise the round-by-round ratio of two candidates."""
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    # A run below the clock's resolution reads as zero seconds: one nanosecond keeps the ratio finite.
    p10, median, p90 = np.percentile(np.maximum(above, 1e-9) / np.maximum(below, 1e-9), [10, 50, 90])
    return Spread(median=float(median), p10=float(p10), p90=float(p90))


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 10.0,
    warmup: int = 3,
    min_rounds: int = 7,
    max_rounds: int = 300,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time the candidates against each other.

    Rounds go on until the time budget is used up, but there are at least ``min_rounds`` (a slow model overruns the
    budget rather than give a median of two runs) and at most ``max_rounds``.

    Args:
        candidates: What to run, by name. Each call must do the whole work (on a GPU: synchronise).
        budget_s: Seconds for the timed rounds of all candidates together.
        warmup: Untimed runs of each candidate first; for slow models cut down to what a third of the budget allows,
            but never to none where some were asked for.
        min_rounds: At least so many rounds.
        max_rounds: At most so many rounds.
        seed: Seed of the order within a round.
        on_round: Called with the number of finished rounds, for a progress bar.
        clock: Monotonic seconds; replaced in tests.

    Raises:
        UsageError: There is nothing to run, or the limits contradict each other.
    """
    if not candidates:
        raise UsageError("nothing to measure", needed="at least one candidate", found="none")
    if not 1 <= min_rounds <= max_rounds:
        raise UsageError(
            "the numbers of rounds do not fit",
            needed="1 <= min_rounds <= max_rounds",
            found=f"{min_rounds}..{max_rounds}",
        )
    order = list(candidates)
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in order}
    with _quiet_collector():
        warmed = _warm_up(candidates, warmup, budget_s / 3, clock)
        started, rounds = clock(), 0
        while rounds < min_rounds or (rounds < max_rounds and clock() - started < budget_s):
            shuffler.shuffle(order)
            for name in order:
                before = clock()
                candidates[name]()
                samples[name].append(clock() - before)
            rounds += 1
            if on_round is not None:
                on_round(rounds)
    return Measured({name: tuple(values) for name, values in samples.items()}, warmed, seed)


def _warm_up(
    candidates: Mapping[str, Callable[[], object]], wanted: int, budget_s: float, clock: Callable[[], float]
) -> int:
    started, done = clock(), 0
    while done < wanted and (done == 0 or clock() - started < budget_s):
        for run in candidates.values():
            run()
        done += 1
    return done


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep the garbage collector out of the timed region: one collection costs more than a small model."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
