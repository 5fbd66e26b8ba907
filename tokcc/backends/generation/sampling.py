"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.errors import LoweringError, UsageError

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 = always the most probable token.
        top_k: Choose among this many tokens; 0 = all.
        top_p: Choose among the most probable tokens that together have this probability.
        seed: Of the random numbers; each row of a batch has its own.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError("the temperature is out of range", needed="0 or more", found=str(self.temperature))
        if self.top_k < 0:
            raise UsageError("top_k is out of range", needed="0 (off) or more", found=str(self.top_k))
        if not 0 < self.top_p <= 1:
            raise UsageError("top_p is out of range", needed="more than 0, at most 1", found=str(self.top_p))
        if self.seed < 0:
            raise UsageError("the seed is negative", needed="0 or more", found=str(self.seed))
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UsageError("top_k and top_p need a temperature", needed="a temperature above 0", found="0")


class Sampler:
    """Draws the tokens of one row.

    Args:
        settings: How.
        row: Its place in the batch.
    """

    def __init__(self, settings: Sampling, row: int) -> None:
        self._settings = settings
        self._random = np.random.default_rng([settings.seed, row])

    def __call__(self, logits: npt.NDArray[Any]) -> int:
        """Choose from logits ``[V]``.

        Raises:
            LoweringError: The engine gives no finite logit, or one that is not a number.
        """
        scores = logits.astype(np.float64)
        if np.isnan(scores).any() or not np.isfinite(scores.max()):
            raise LoweringError(
                "the engine's logits are not numbers",
                found="NaN or infinity",
                help="fp16 engines can overflow: compile with --dtype float32",
            )
        if self._settings.temperature == 0:
            return int(scores.argmax())
        return int(self._random.choice(len(scores), p=_probabilities(scores, self._settings)))


def _probabilities(scores: npt.NDArray[np.float64], settings: Sampling) -> npt.NDArray[np.float64]:
    scores = (scores - scores.max()) / settings.temperature
    if 0 < settings.top_k < len(scores):
        smallest = np.partition(scores, -settings.top_k)[-settings.top_k]
        scores = np.where(scores < smallest, -np.inf, scores)
    weights = np.exp(scores)
    weights /= weights.sum()
    if settings.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= settings.top_p]] = 0.0
        weights /= weights.sum()
    return weights
