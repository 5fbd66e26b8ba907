"""Interleaved timing: on a shared machine only the ratio of neighbours in time means something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Seconds = dict[str, list[float]]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Time every run once a round (A B C, B C A, ...), after ``warmup`` untimed rounds.

    The order rotates, so that none always follows the same neighbour (caches, thermal state). On a machine whose cores
    others want, ``time.process_time`` leaves out what a run waited for one: right for runs of one thread.
    """
    names = list(runs)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            runs[name]()
            elapsed = clock() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def summary(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = (float(part) for part in np.percentile(values, [25, 50, 75]))
    return {"median": middle, "p25": low, "p75": high, "runs": len(values)}


def milliseconds(values: list[float]) -> dict[str, Any]:
    """Median and quartiles of seconds, in milliseconds."""
    return {key: value * 1000 if key != "runs" else value for key, value in summary(values).items()}


def speedups(seconds: Seconds, baseline: str) -> dict[str, dict[str, Any]]:
    """For each run, the ratio baseline / run, taken round by round and then summarised."""
    base = seconds[baseline]
    return {
        name: summary([slow / fast for slow, fast in zip(base, values, strict=True)])
        for name, values in seconds.items()
        if name != baseline
    }
