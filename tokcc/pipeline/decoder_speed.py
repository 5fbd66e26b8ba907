"""How fast two engines generate, and what their caches hold, while both read the same tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tokcc.pipeline.needles import plant
from tokcc.pipeline.reading import PIECE, Array, Engine, Reading
from tokcc.report.measure import Measured, measure, timed_seconds
from tokcc.report.schema import ContextPoint, NeedlePoint, Spread

__all__ = ["CONTEXTS", "Growth", "Limits", "break_even", "grow", "reached", "weight_bytes"]

CONTEXTS = (512, 1024, 2048, 4096, 8192)
Clock = Callable[[], float]


@dataclass(frozen=True)
class Limits:
    """How long to measure.

    Attributes:
        budget_s: Seconds for everything; no context is begun that would not end in it, but the first one.
        steps_s: Of them, seconds for the timed steps.
        runs: Timed steps of each engine at every context; None = as many as the time allows.
    """

    budget_s: float = 90.0
    steps_s: float = field(default_factory=timed_seconds)
    runs: int | None = None


@dataclass(frozen=True)
class Growth:
    """What was seen while the caches grew.

    Attributes:
        points: By context.
        needles: By context and depth.
        timed: Of the longest context.
        before: The baseline's cache at the longest context.
        after: The engine's.
        notes: What was left out.
    """

    points: tuple[ContextPoint, ...]
    needles: tuple[NeedlePoint, ...]
    timed: Measured
    before: Mapping[str, Array]
    after: Mapping[str, Array]
    notes: tuple[str, ...]

    @property
    def context(self) -> int:
        """The longest context."""
        return self.points[-1].context

    def seconds_for(self, tokens: int) -> float:
        """Return how long both engines will take to read so many tokens, about."""
        last = self.points[-1]
        return (last.first_token_before + last.first_token_after) * tokens / last.context


def reached(positions: int | None) -> tuple[int, ...]:
    """Return the contexts to look at: each leaves a position for the token after it."""
    return tuple(c for c in CONTEXTS if positions is None or c < positions) or (max((positions or 2) - 1, 1),)


def grow(
    baseline: Engine,
    engine: Engine,
    ids: Array,
    contexts: Sequence[int],
    *,
    vocabulary: int,
    weights: tuple[int, int],
    limits: Limits,
    batch: int = 1,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> Growth:
    """Let two engines read the same tokens piece by piece, in turns, and time single steps at every context.

    Args:
        baseline: The engine with the whole cache.
        engine: The other one.
        ids: At least as many tokens as the longest context.
        contexts: Ascending.
        vocabulary: Number of tokens.
        weights: Bytes of weights that a step of each reads.
        limits: How long to measure.
        batch: Rows.
        seed: Of the needles and of the order within a round.
        advance: Called for every context.
        clock: Monotonic seconds; replaced in tests.
    """
    needles = plant(ids[: contexts[-1]], contexts, vocabulary, np.random.default_rng(seed))
    before, after = Reading(baseline, batch), Reading(engine, batch)
    read = _Pieces(before, after, needles.ids, random.Random(seed), clock)
    points: list[ContextPoint] = []
    found: list[NeedlePoint] = []
    notes: list[str] = []
    started = clock()
    timed: Measured | None = None
    held: tuple[Mapping[str, Array], Mapping[str, Array]] = before.past, after.past
    for context in contexts:
        deadline = None if timed is None else started + limits.budget_s
        if not read.until(context, deadline):
            notes.append(
                f"speed was measured up to a context of {points[-1].context} tokens: "
                f"{context} do not fit into {limits.budget_s:.0f} seconds"
            )
            break
        held = before.past, after.past
        token = ids[:1]
        timed = measure(
            {"baseline": lambda t=token: before.peek(t), "engine": lambda t=token: after.peek(t)},  # type: ignore[misc]
            budget_s=0.0 if limits.runs else limits.steps_s / len(contexts),
            min_rounds=limits.runs or 7,
            max_rounds=limits.runs or 300,
            seed=seed,
        )
        points.append(_point(context, timed, read.seconds, before, after, weights, batch))
        found += needles.ask(context, before, after)
        advance(1)
    assert timed is not None  # the first context has no deadline
    return Growth(tuple(points), tuple(found), timed, *held, tuple(notes))


class _Pieces:
    """Two readings of the same text, in turns."""

    def __init__(self, before: Reading, after: Reading, ids: Array, order: random.Random, clock: Clock) -> None:
        self._readings = {"baseline": before, "engine": after}
        self._ids, self._random, self._clock = ids, order, clock
        self.seconds = {"baseline": 0.0, "engine": 0.0}
        self._pace = 0.0  # seconds a token of the last piece, both engines together

    def until(self, context: int, deadline: float | None) -> bool:
        """Read on to a context; False when it does not fit before the deadline."""
        start = self._readings["engine"].seen
        while start < context:
            stop = min(start + PIECE, context)
            # A token takes about as long as the one before it, or longer: caches do not shrink.
            if deadline is not None and self._clock() + self._pace * (context - start) > deadline:
                return False
            names = list(self._readings)
            self._random.shuffle(names)
            both = 0.0
            for name in names:
                begun = self._clock()
                self._readings[name].read(self._ids[start:stop])
                taken = self._clock() - begun
                self.seconds[name] += taken
                both += taken
            self._pace = both / (stop - start)
            start = stop
        return True


def _point(
    context: int,
    timed: Measured,
    reading: Mapping[str, float],
    before: Reading,
    after: Reading,
    weights: tuple[int, int],
    batch: int,
) -> ContextPoint:
    one, two = (max(timed.timing(name).median, 1e-9) for name in ("baseline", "engine"))
    moved = weights[0] + before.cache_bytes, weights[1] + after.cache_bytes
    return ContextPoint(
        context=context,
        seconds_before=one,
        seconds_after=two,
        tokens_per_second_before=batch / one,
        tokens_per_second_after=batch / two,
        speedup=timed.speedup("baseline", "engine"),
        runs=timed.runs,
        first_token_before=reading["baseline"],
        first_token_after=reading["engine"],
        cache_bytes_before=before.cache_bytes,
        cache_bytes_after=after.cache_bytes,
        bound=max(moved[0], 1) / max(moved[1], 1),
    )


def break_even(points: Sequence[tuple[int, Spread]]) -> int | None:
    """Return the first measured number of tokens from which on the engine is faster.

    Args:
        points: Tokens, ascending, and the speedup there.
    """
    found = None
    for tokens, speedup in reversed(points):
        if speedup.median <= 1:
            break
        found = tokens
    return found


def weight_bytes(path: Path) -> int:
    """Return the bytes of weights that a step reads: all but tables from which it only takes rows."""
    model = onnx.load(str(path), load_external_data=False)
    read = set(_read(model.graph))
    return sum(_bytes(item) for item in model.graph.initializer if item.name in read)


def _read(graph: onnx.GraphProto) -> list[str]:
    names = [output.name for output in graph.output]
    for node in graph.node:
        names += node.input[1:] if node.op_type == "Gather" else node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                names += _read(inner)
    return names


def _bytes(tensor: Any) -> int:
    if tensor.external_data:
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), None)
        if length is not None:
            return int(length)
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * int(width)
