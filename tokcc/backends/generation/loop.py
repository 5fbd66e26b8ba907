"""The loop: prompts in, tokens out, one call of the engine for each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tokcc.backends.bundle import Bundle
from tokcc.backends.generation.decoder import DecoderEngine
from tokcc.backends.generation.sampling import Sampler, Sampling
from tokcc.backends.runtime_files import stop_tokens
from tokcc.errors import UsageError

__all__ = ["Generation", "Generator"]


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
    ) -> Generation:
        """Generate step by step.

        Args:
            prompts: Token ids, one row for each prompt; rows may differ in length and are padded on the left.
            max_new_tokens: At most this many in each row.
            sampling: How tokens are chosen; the most probable one by default.
            stop: Tokens that end a row; by default what the files beside the engine say.

        Returns:
            An iterator over the steps.

        Raises:
            UsageError: A prompt is empty, or a setting is out of range.
        """
        if not prompts or not all(len(row) for row in prompts):
            raise UsageError("a prompt is empty", needed="at least one token in every prompt")
        if max_new_tokens < 1:
            raise UsageError("nothing is to be generated", needed="max_new_tokens of at least 1")
        ends = frozenset(stop_tokens(self.engine.folder) if stop is None else stop)
        return Generation(self.engine, prompts, max_new_tokens, sampling or Sampling(), ends)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Generate at once; returns the new tokens of each row, with the token that ended it. Arguments as above."""
        generation = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        for _ in generation:
            pass
        return generation.rows


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
    ) -> None:
        batch, length = len(prompts), max(map(len, prompts))
        self._engine, self._left, self._stop = engine, max_new_tokens, stop
        self._ids = np.zeros((batch, length), np.int64)
        self._mask = np.zeros((batch, length), np.int64)
        for row, prompt in enumerate(prompts):
            self._ids[row, length - len(prompt) :] = prompt
            self._mask[row, length - len(prompt) :] = 1
        self._positions = np.maximum(self._mask.cumsum(1) - 1, 0)
        self._past = engine.empty_past(batch)
        self._samplers = [Sampler(sampling, row) for row in range(batch)]
        self.stopped = [False] * batch
        self.rows: list[list[int]] = [[] for _ in prompts]
        self.cache_bytes = 0
        self.fed = 0
        self.prompt_seconds = 0.0
        self.step_seconds = 0.0

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
        logits, self._past = self._engine.call(self._ids, self._mask, self._positions, self._past)
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
        self._positions = self._positions[:, -1:] + 1
        self._left -= 1
        return step

    def _account(self, seconds: float) -> None:
        self.cache_bytes = sum(value.nbytes for value in self._past.values())
        if self.fed == 0:
            self.prompt_seconds = seconds
        else:
            self.step_seconds += seconds
        self.fed = self._mask.shape[1]
