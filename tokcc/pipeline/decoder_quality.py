"""What a reduced cache costs on a text: perplexity, agreement and divergence, both engines on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokcc.errors import UsageError
from tokcc.pipeline.reading import PIECE, Array, Engine, Reading
from tokcc.report.distances import log_softmax
from tokcc.report.fidelity import FidelityMeter
from tokcc.report.schema import Fidelity, TaskMetric, TextPoint
from tokcc.report.tokens import TokenText

__all__ = [
    "LONGEST",
    "SHORTEST",
    "TEXT_CONTEXTS",
    "Quality",
    "Surprise",
    "refuse_single_rows",
    "text_contexts",
    "text_quality",
]

TEXT_CONTEXTS = (1024, 2048, 4096, 8192)
SHORTEST = 2 * PIECE
"""Fewest tokens of a text: the first piece is attended to as a whole, and nothing is read from a cache."""
LONGEST = TEXT_CONTEXTS[-1]
_ROWS = 128


@dataclass(frozen=True)
class Quality:
    """What was found on a text.

    Attributes:
        points: By context, ascending.
        fidelity: Of the longest one, in the form that gates read.
        notes: What a user should know.
        warnings: What a user should act on, if the policy is to make caches smaller.
    """

    points: tuple[TextPoint, ...]
    fidelity: Fidelity
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


class Surprise:
    """Sum of the negative log probabilities that an engine gave the tokens that came."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0
        self._last: Array | None = None

    def add(self, logits: Array, ids: Array) -> None:
        """Take in a piece; its first token was predicted by the last row of the piece before."""
        rows = logits[:-1] if self._last is None else np.concatenate([self._last[None], logits[:-1]])
        targets = ids[1:] if self._last is None else ids
        for start in range(0, len(targets), _ROWS):
            wanted = targets[start : start + _ROWS]
            found = log_softmax(rows[start : start + _ROWS])
            self.total -= float(found[np.arange(len(wanted)), wanted].sum())
        self.count += len(targets)
        self._last = logits[-1]

    @property
    def perplexity(self) -> float | None:
        """Exponential of the mean; None when it is no number."""
        mean = self.total / self.count if self.count else math.nan
        # Rounding may leave a certain prediction a little above probability 1.
        return max(math.exp(mean), 1.0) if math.isfinite(mean) and mean < 700 else None


def text_contexts(length: int) -> tuple[int, ...]:
    """Return the contexts that fit a text; a short one is taken as a whole."""
    return tuple(c for c in TEXT_CONTEXTS if c <= length) or (length,)


def refuse_single_rows() -> UsageError:
    """Say why an engine that computes the last token's logits alone cannot be measured on text."""
    return UsageError(
        "a text needs the logits of all its tokens, and this engine computes those of the last token alone",
        found="`outputs: {logits: last_token}`",
        help="measure the same policy without that contract: its caches are the same",
    )


def text_quality(
    baseline: Engine,
    engine: Engine,
    text: TokenText,
    *,
    positions: int | None,
    batch: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> Quality:
    """Read a text with both engines.

    Args:
        baseline: The engine with the whole cache.
        engine: The other one.
        text: The text.
        positions: How many the model has; None = unknown.
        batch: Rows, all the same.
        advance: Called with the tokens of every piece.

    Raises:
        UsageError: The engine does not give the logits of all tokens, or the model has too few positions.
    """
    known = len(text.ids) if positions is None else min(len(text.ids), positions)
    if known <= PIECE:
        raise UsageError(
            "the model has too few positions to measure on a text",
            needed=f"more than {PIECE}, the tokens of a call: nothing is read from a cache before the second one",
            found=str(known),
        )
    contexts = text_contexts(known)
    notes = []
    if contexts[-1] < TEXT_CONTEXTS[0]:
        notes.append(f"the text is short: {contexts[-1]} tokens say little about a cache that is meant for more")
    meter = FidelityMeter(logits=["logits"])
    before, after = Reading(baseline, batch), Reading(engine, batch)
    surprise = Surprise(), Surprise()
    points: list[TextPoint] = []
    for context in contexts:
        while before.seen < context:
            ids = text.ids[before.seen : min(before.seen + PIECE, context)]
            one, two = before.read(ids), after.read(ids)
            if not len(one) == len(two) == len(ids):
                raise refuse_single_rows()
            surprise[0].add(one, ids)
            surprise[1].add(two, ids)
            meter.update({"logits": one}, {"logits": two})
            advance(len(ids))
        points.append(_point(context, surprise, meter))
    warnings = []
    if after.cache_bytes >= before.cache_bytes:
        warnings.append(
            f"the caches are not smaller after the {before.seen} tokens of text that were read: "
            "fidelity was not put to the test, give a longer text"
        )
    return Quality(tuple(points), _fidelity(meter, points, text), tuple(notes), tuple(warnings))


def _point(context: int, surprise: Sequence[Surprise], meter: FidelityMeter) -> TextPoint:
    (output,) = meter.result(source="").outputs
    return TextPoint(
        context=context,
        predicted=surprise[0].count,
        perplexity_before=surprise[0].perplexity,
        perplexity_after=surprise[1].perplexity,
        top1_agreement=output.top1_agreement,
        kl=output.kl,
    )


def _fidelity(meter: FidelityMeter, points: Sequence[TextPoint], text: TokenText) -> Fidelity:
    last = points[-1]
    metrics: tuple[TaskMetric, ...] = ()
    if last.perplexity_before is not None and last.perplexity_after is not None:
        perplexity = TaskMetric(
            name="perplexity",
            output="logits",
            before=last.perplexity_before,
            after=last.perplexity_after,
            samples=last.predicted,
            higher_is_better=False,
        )
        metrics = (perplexity,)
    return meter.result(source=text.source).model_copy(update={"metrics": metrics})
