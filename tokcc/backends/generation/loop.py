"""The loop: prompts in, tokens out, one call of the engine for each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.backends.bundle import Bundle
from tokcc.backends.generation.decoder import DecoderEngine
from tokcc.backends.generation.sampling import Sampler, Sampling
from tokcc.backends.runtime_files import stop_tokens
from tokcc.errors import UsageError

__all__ = ["Generation", "Generator", "Media", "left_padded"]

Rows = Mapping[str, Sequence[Sequence[float]]]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Media:
    """What images or sounds make of padded prompts.

    Attributes:
        embeds: ``[B, S, H]``: embeddings of the prompts with features in the places of placeholders.
        positions: int64 ``[3, B, S]``, where they are not counted one by one.
        beside: Inputs that the policy added, by name.
    """

    embeds: Array
    positions: Array | None = None
    beside: Mapping[str, Array] = field(default_factory=dict)


class Generator:
    """Generates with a compiled decoder.

    It feeds true positions and the true mask, carries every ``past_key_values.*`` from the ``present.*`` of the call
    before, and knows nothing of what the engine does to its cache.

    Args:
        engine: A bundle, its folder, or an ONNX file.
        threads: Of the runtime; 0 = its default.

    Raises:
        UsageError: The engine is not a decoder's.
    """

    def __init__(self, engine: Bundle | str | Path | DecoderEngine, *, threads: int = 0) -> None:
        self.engine = engine if isinstance(engine, DecoderEngine) else DecoderEngine(engine, threads=threads)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        given: Rows | None = None,
    ) -> Generation:
        """Generate step by step.

        Args:
            prompts: Token ids, one row for each prompt; rows may differ in length and are padded on the left.
            max_new_tokens: At most this many in each row.
            sampling: How tokens are chosen; the most probable one by default.
            stop: Tokens that end a row; by default what the files beside the engine say.
            given: Inputs that the policy added, for the prompts: a row for each of them; nothing afterwards.

        Returns:
            An iterator over the steps.

        Raises:
            UsageError: A prompt is empty, a setting is out of range, what is given does not fit, or the engine's caches
                have too few slots.
        """
        if not prompts or not all(len(row) for row in prompts):
            raise UsageError("a prompt is empty", needed="at least one token in every prompt")
        if max_new_tokens < 1:
            raise UsageError("nothing is to be generated", needed="max_new_tokens of at least 1")
        ends = frozenset(stop_tokens(self.engine.folder) if stop is None else stop)
        return Generation(self.engine, prompts, max_new_tokens, sampling or Sampling(), ends, given)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        given: Rows | None = None,
    ) -> list[list[int]]:
        """Generate at once; returns the new tokens of each row, with the token that ended it. Arguments as above."""
        return self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, given=given).finish()


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Return tokens and mask int64 ``[B, S]`` of rows of different lengths."""
    length = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


class Generation(Iterator[tuple[int | None, ...]]):
    """A running generation. Each step gives a token for every row, None for a row that has ended.

    Attributes:
        rows: New tokens so far.
        stopped: Whether a row has come to a token that ends it.
        cache_bytes: What the cache held after the latest call, with all that is carried beside keys and values.
        fed: Tokens of the longest row that the engine has seen, prompt and all.
        prompt_seconds: Time of the first call.
        step_seconds: Time of all the others together.
    """

    def __init__(
        self,
        engine: DecoderEngine,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: frozenset[int],
        given: Rows | None = None,
        media: Media | None = None,
    ) -> None:
        batch, length = len(prompts), max(map(len, prompts))
        engine.refuse_more(length + max_new_tokens - 1)  # the last one is never read
        self._engine, self._left, self._stop = engine, max_new_tokens, stop
        self._ids, self._mask = left_padded(prompts)
        self._positions = np.maximum(self._mask.cumsum(1) - 1, 0)
        self._past = engine.empty_past(batch)
        self._given = engine.given(given or {}, batch, length)
        if media is not None:
            self._given |= {**media.beside, "inputs_embeds": media.embeds}
            if media.positions is not None:
                self._positions = media.positions
        self._samplers = [Sampler(sampling, row) for row in range(batch)]
        self.stopped = [False] * batch
        self.rows: list[list[int]] = [[] for _ in prompts]
        self.cache_bytes = 0
        self.fed = 0
        self.prompt_seconds = 0.0
        self.step_seconds = 0.0

    def finish(self) -> list[list[int]]:
        """Take all steps that are left and return the rows."""
        for _ in self:
            pass
        return self.rows

    @property
    def whole_cache_bytes(self) -> int:
        """What keys and values of all tokens so far would hold without eviction."""
        return self._engine.slot_bytes * self.fed * len(self.rows)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows by second, after the first call; 0 when there was only one."""
        steps = sum(len(row) for row in self.rows) - len(self.rows)
        return steps / self.step_seconds if self.step_seconds else 0.0

    def __next__(self) -> tuple[int | None, ...]:
        if self._left == 0 or all(self.stopped):
            raise StopIteration
        started = time.perf_counter()
        logits, self._past = self._engine.call(self._ids, self._mask, self._positions, self._past, self._given)
        self._given = {}
        chosen = [sample(row) for sample, row in zip(self._samplers, logits, strict=True)]
        self._account(time.perf_counter() - started)
        step = tuple(None if ended else token for token, ended in zip(chosen, self.stopped, strict=True))
        for row, token in enumerate(step):
            if token is not None:
                self.rows[row].append(token)
                self.stopped[row] = token in self._stop
        # A row that has ended goes on unseen: rows do not know of each other, and the mask keeps its form.
        self._ids = np.array(chosen, np.int64)[:, None]
        self._mask = np.concatenate([self._mask, np.ones_like(self._ids)], 1)
        self._positions = self._following()
        self._left -= 1
        return step

    def _following(self) -> Array:
        """Return the positions of the next tokens: past the furthest so far, which a picture may have brought."""
        last = self._positions.max(-1, keepdims=True)
        return (last if last.ndim == 2 else np.broadcast_to(last.max(0, keepdims=True), last.shape)) + 1

    def _account(self, seconds: float) -> None:
        self.cache_bytes = sum(value.nbytes for value in self._past.values())
        if self.fed == 0:
            self.prompt_seconds = seconds
        else:
            self.step_seconds += seconds
        self.fed = self._mask.shape[1]
