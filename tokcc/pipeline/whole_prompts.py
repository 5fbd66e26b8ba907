"""How long two engines need for a prompt in one call, by its length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tokcc.pipeline.decoder_speed import Clock, Limits
from tokcc.pipeline.reading import Array, Engine, Reading
from tokcc.report.measure import Measured, measure
from tokcc.report.schema import PromptPoint

__all__ = ["Prompts", "time_prompts"]

_ROUNDS = 3


@dataclass(frozen=True)
class Prompts:
    """What was measured.

    Attributes:
        points: By length.
        timed: Of the longest prompt.
        notes: What was left out.
    """

    points: tuple[PromptPoint, ...]
    timed: Measured
    notes: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.points[-1].tokens


def time_prompts(
    baseline: Engine,
    engine: Engine,
    ids: Array,
    lengths: Sequence[int],
    *,
    limits: Limits,
    batch: int = 1,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> Prompts:
    """Let two engines read prompts in one call each, in turns; the first length is measured whatever it takes.

    Args:
        baseline: The engine that reads everything.
        engine: The other one.
        ids: At least as many tokens as the longest prompt.
        lengths: Ascending.
        limits: How long to measure; ``steps_s`` are shared by the lengths, and a length gets three rounds at least.
        batch: Rows.
        seed: Of the order within a round.
        advance: Called for every length.
        clock: Monotonic seconds; replaced in tests.
    """
    points: list[PromptPoint] = []
    notes: list[str] = []
    started, timed = clock(), None
    for place, length in enumerate(lengths):
        rounds = limits.runs or _ROUNDS
        if points:
            last = points[-1]
            a_round = (last.seconds_before + last.seconds_after) * (length / last.tokens) ** 2
            if clock() - started + a_round * rounds > limits.budget_s:
                notes.append(
                    f"prompts were measured up to {last.tokens} tokens: {length} may not fit into "
                    f"{limits.budget_s:.0f} seconds"
                )
                break
        timed = measure(
            {
                "baseline": partial(Reading(baseline, batch).peek, ids[:length]),
                "engine": partial(Reading(engine, batch).peek, ids[:length]),
            },
            budget_s=0.0 if limits.runs else limits.steps_s / len(lengths),
            warmup=1 if place == 0 else 0,
            min_rounds=rounds,
            max_rounds=limits.runs or 30,
            seed=seed,
            clock=clock,
        )
        one, two = (max(timed.timing(name).median, 1e-9) for name in ("baseline", "engine"))
        points.append(
            PromptPoint(
                tokens=length,
                seconds_before=one,
                seconds_after=two,
                speedup=timed.speedup("baseline", "engine"),
                runs=timed.runs,
            )
        )
        advance(1)
    assert timed is not None  # the first length has no deadline
    return Prompts(tuple(points), timed, tuple(notes))
