"""Copied needles: random tokens somewhere in a context, and again at its end. Is the copy predicted?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokcc.pipeline.reading import Array, Reading
from tokcc.report.schema import NeedlePoint

__all__ = ["CUE", "LENGTH", "Needles", "plant", "usual_tokens"]

LENGTH = 16
"""Tokens of a needle."""
CUE = 4
"""Tokens of the copy that are given before the first one that counts."""
DEPTHS = (0.1, 0.25, 0.5, 0.75, 0.9)
_SHORTEST = 8 * LENGTH
_ENOUGH = 512


@dataclass(frozen=True)
class Needles:
    """A text with needles in it.

    Attributes:
        ids: The text.
        places: Depth and first position of the needles of each context.
    """

    ids: Array
    places: dict[int, tuple[tuple[float, int], ...]]

    def ask(self, context: int, before: Reading, after: Reading) -> list[NeedlePoint]:
        """Let both readings, which have read the context, go through a copy of each of its needles."""
        points = []
        for depth, start in self.places.get(context, ()):
            needle = self.ids[start : start + LENGTH]
            hits = [_hits(reading, needle) for reading in (before, after)]
            points.append(
                NeedlePoint(
                    context=context,
                    depth=depth,
                    position=start,
                    predictions=LENGTH - CUE,
                    hits_before=hits[0],
                    hits_after=hits[1],
                )
            )
        return points


def plant(ids: Array, contexts: Sequence[int], vocabulary: int, rng: np.random.Generator) -> Needles:
    """Put needles into a text at several depths of each context; contexts share those that lie at the same place.

    Args:
        ids: The text, as long as the longest context.
        contexts: Ascending.
        vocabulary: Number of tokens.
        rng: Draws the needles.
    """
    ids = ids.copy()
    taken: list[int] = []
    places: dict[int, tuple[tuple[float, int], ...]] = {}
    for context in contexts:
        found = []
        for depth in DEPTHS if context >= _SHORTEST else ():
            start = min(round(depth * context), context - LENGTH)
            if start not in taken:
                if any(abs(start - other) < LENGTH for other in taken):
                    continue
                taken.append(start)
                ids[start : start + LENGTH] = usual_tokens(vocabulary, LENGTH, rng)
            found.append((depth, start))
        places[context] = tuple(found)
    return Needles(ids, places)


def usual_tokens(vocabulary: int, count: int, rng: np.random.Generator) -> Array:
    """Draw tokens that a model has often seen: vocabularies are mostly sorted so, special ones and bytes in front.

    None comes again before all have come, since entries of equal tokens may be equal.
    """
    first, last = vocabulary // 128, vocabulary // 16
    if last - first < _ENOUGH:
        first, last = 0, vocabulary
    rounds = -(-count // max(last - first, 1))
    drawn = np.concatenate([rng.permutation(last - first) for _ in range(rounds)])[:count]
    return np.asarray(drawn + first, np.int64)


def _hits(reading: Reading, needle: Array) -> int:
    """Count the tokens behind the cue that are the first guess, after the true ones before them."""
    logits = reading.peek(needle)
    if len(logits) != len(needle):  # an engine that gives the last token's logits alone reads one by one
        reading = reading.branch()
        logits = np.concatenate([reading.read(needle[i : i + 1]) for i in range(len(needle))])
    guesses = logits[CUE - 1 : -1].argmax(axis=-1)
    return int((guesses == needle[CUE:]).sum())
