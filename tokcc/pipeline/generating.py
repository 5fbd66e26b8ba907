"""Two engines of a decoder against each other: speed, caches, text, needles. It knows files, and nothing of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tokcc.backends.generation import DecoderEngine
from tokcc.pipeline.decoder_quality import Quality, text_contexts, text_quality
from tokcc.pipeline.decoder_speed import Growth, Limits, break_even, grow, reached, weight_bytes
from tokcc.pipeline.needles import usual_tokens
from tokcc.pipeline.occupancy import Followed, follow, prompt_length
from tokcc.pipeline.reading import PIECE, Array, Reading
from tokcc.pipeline.stages import Stages
from tokcc.pipeline.whole_prompts import Prompts, time_prompts
from tokcc.report.measure import Measured
from tokcc.report.schema import BreakEvenPoint, Decoding
from tokcc.report.tokens import TokenText

__all__ = ["Generated", "Pair"]


@dataclass(frozen=True)
class Generated:
    """What was measured.

    Attributes:
        decoding: For the report.
        growth: Speed and caches.
        quality: On the text, or None.
        feeds: Inputs of the engine in the step that was timed last.
        notes: What a user should know.
        prompts: Prompts in one call, where they were timed.
        prompt_feeds: Inputs of the engine for the longest of them.
    """

    decoding: Decoding
    growth: Growth
    quality: Quality | None
    feeds: Mapping[str, Array]
    notes: tuple[str, ...]
    prompts: Prompts | None = None
    prompt_feeds: Mapping[str, Array] = field(default_factory=dict)

    @property
    def timed(self) -> Measured:
        """What the policy is about: the longest prompt where prompts were timed, steps at the longest context else."""
        return self.growth.timed if self.prompts is None else self.prompts.timed

    @property
    def timed_feeds(self) -> Mapping[str, Array]:
        """Inputs of the engine in it."""
        return self.feeds if self.prompts is None else self.prompt_feeds

    @property
    def break_even(self) -> tuple[BreakEvenPoint, ...]:
        """Ratio over contexts or prompts, in the form that all reports have."""
        rows = self.decoding.batch
        if self.prompts is not None:
            return tuple(
                BreakEvenPoint(
                    shapes={"input_ids": (rows, p.tokens), "attention_mask": (rows, p.tokens)},
                    label=f"a prompt of {p.tokens}",
                    tokens=p.tokens,
                    ratio=p.speedup,
                    runs=p.runs,
                )
                for p in self.prompts.points
            )
        return tuple(
            BreakEvenPoint(
                shapes={"input_ids": (rows, 1), "attention_mask": (rows, p.context + 1)},
                label=f"one token after {p.context}",
                tokens=p.context,
                ratio=p.speedup,
                runs=p.runs,
            )
            for p in self.decoding.points
        )


class Pair:
    """The engine with the whole cache, and the one with a smaller one.

    Args:
        baseline: Its file.
        engine: Its file.
        positions: How many the model has; None = unknown.
        batch: Rows; None = what the engine fixes, or one.
        threads: Of the runtime; 0 = its default.
        seed: Of random tokens and of the order within a round.

    Raises:
        UsageError: One of the files is not a decoder's engine.
    """

    def __init__(
        self,
        baseline: Path,
        engine: Path,
        *,
        positions: int | None,
        batch: int | None = None,
        threads: int = 0,
        seed: int = 0,
    ) -> None:
        self._before, self._after = DecoderEngine(baseline, threads=threads), DecoderEngine(engine, threads=threads)
        self._weights = weight_bytes(baseline), weight_bytes(engine)
        self._positions = positions
        self._batch = self._before.batch or self._after.batch or batch or 1
        self._seed = seed

    def measure(
        self, stages: Stages, *, text: TokenText | None, limits: Limits, whole: bool = True, prompts: bool = False
    ) -> Generated:
        """Measure everything.

        Args:
            stages: Progress.
            text: The calibration text, or None.
            limits: How long to measure.
            whole: Also look at text and caches, not at speed alone.
            prompts: Also time prompts in one call, which are what counts then.
        """
        contexts = reached(self._positions)
        vocabulary = self._before.vocabulary or self._after.vocabulary or self._first_logits()
        stream, tokens = self._stream(text, contexts[-1], vocabulary)
        with stages.stage("measure decoding", len(contexts)) as advance:
            growth = grow(
                self._before,
                self._after,
                stream,
                contexts,
                vocabulary=vocabulary,
                weights=self._weights,
                limits=limits,
                batch=self._batch,
                seed=self._seed,
                advance=advance,
            )
        read: Prompts | None = None
        if prompts:
            with stages.stage("measure prompts", len(contexts)) as advance:
                read = time_prompts(
                    self._before,
                    self._after,
                    stream,
                    contexts,
                    limits=limits,
                    batch=self._batch,
                    seed=self._seed,
                    advance=advance,
                )
        quality: Quality | None = None
        if text is not None and whole:
            longest = len(text.ids) if self._positions is None else min(len(text.ids), self._positions)
            with stages.stage("measure fidelity", text_contexts(longest)[-1]) as advance:
                quality = text_quality(
                    self._before, self._after, text, positions=self._positions, batch=self._batch, advance=advance
                )
        followed: Followed | None = None
        if whole:
            length = prompt_length(growth.after, len(stream), vocabulary)
            if growth.seconds_for(length) <= limits.budget_s:
                with stages.stage("follow the cache"):
                    followed = follow(self._before, self._after, stream[:length], batch=self._batch)
        decoding = Decoding(
            tokens=tokens,
            piece=PIECE,
            batch=self._batch,
            weight_bytes_before=self._weights[0],
            weight_bytes_after=self._weights[1],
            points=growth.points,
            break_even=break_even([(p.context, p.speedup) for p in growth.points]),
            prompts=read.points if read else (),
            prompt_break_even=break_even([(p.tokens, p.speedup) for p in read.points]) if read else None,
            text=quality.points if quality else (),
            needles=growth.needles,
            occupancy=followed.facts() if followed else None,
        )
        notes = [*growth.notes, *(read.notes if read else ()), *(quality.notes if quality else ())]
        if followed is not None and followed.note:
            notes.append(followed.note)
        elif followed is None and whole:
            notes.append(f"there is no picture of what caches keep: {length} tokens take too long here")
        feeds = self._feeds(1, growth.context + 1, growth.after)
        first = self._feeds(read.longest, read.longest, self._after.empty_past(self._batch)) if read else {}
        return Generated(decoding, growth, quality, feeds, tuple(notes), read, first)

    def _first_logits(self) -> int:
        return int(Reading(self._before, self._batch).peek(np.zeros(1, np.int64)).shape[-1])

    def _stream(self, text: TokenText | None, length: int, vocabulary: int) -> tuple[Array, str]:
        """Return the tokens to read, and what they are."""
        random = usual_tokens(vocabulary, length, np.random.default_rng(self._seed))
        if text is None:
            return random, f"random tokens, seed {self._seed}"
        known = text.ids[:length]
        if len(known) == length:
            return known, text.source
        return np.concatenate([known, random[len(known) :]]), f"{text.source}, then random tokens"

    def _feeds(self, new: int, seen: int, past: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs of a call that sees so many tokens, its own included, for their shapes."""
        rows, axes = self._batch, self._after.position_axes
        return {
            "input_ids": np.zeros((rows, new), np.int64),
            "attention_mask": np.zeros((rows, seen), np.int64),
            "position_ids": np.zeros((*([axes] if axes > 1 else []), rows, new), np.int64),
            **self._after.nothing(rows, new),
            **past,
        }
