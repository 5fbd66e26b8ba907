"""Inputs of a decoder's engine that its policy added: what stands for nothing, how rows of a batch are filled up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.errors import UsageError
from tokcc.passes.inputs import EngineInput

__all__ = ["ADDED_INPUTS", "AddedInput", "added_inputs", "described", "nothing_for"]

ADDED_INPUTS = "tokcc.inputs"
"""Key of an engine's metadata: the inputs that the policy added, as :func:`described` writes them."""

Array = npt.NDArray[Any]
_BATCH, _NEW = "B", "S"


@dataclass(frozen=True)
class AddedInput:
    """One such input.

    Attributes:
        name: Its name.
        shape: Numbers and symbols: ``B`` rows, ``S`` new tokens; any other is a size of its own, 0 where nothing is
            given.
        unguided: What fills it where nothing is given, and rows that are shorter than others.
        doc: What it holds.
        token: 1 where a token has this id; None = the ids do not say.
    """

    name: str
    shape: tuple[int | str, ...]
    unguided: float
    doc: str
    token: int | None = None

    def nothing(self, batch: int, new: int, dtype: Any) -> Array:
        """Return what to feed where nothing is given."""
        return nothing_for(self, batch, new).astype(dtype)

    def rows(self, given: Sequence[Sequence[float]], batch: int, new: int, dtype: Any) -> Array:
        """Return rows of different lengths as one array: filled up in front by token, as prompts are, else behind.

        Raises:
            UsageError: The input does not hold rows, or there is not one for every prompt.
        """
        if len(self.shape) != 2 or self.shape[0] != _BATCH or isinstance(self.shape[1], int):
            raise UsageError(f"`{self.name}` holds no rows of numbers", needed=f"{self.shape}: use DecoderEngine.call")
        longest = max(map(len, given), default=0)
        if len(given) != batch or (self.shape[1] == _NEW and longest > new):
            raise UsageError(
                f"`{self.name}` does not fit the prompts",
                needed=f"{batch} rows" + (f" of at most {new}" if self.shape[1] == _NEW else ""),
                found=f"{len(given)} rows, the longest of {longest}",
            )
        width = new if self.shape[1] == _NEW else longest
        made = np.full((batch, width), self.unguided, dtype)
        for row, numbers in enumerate(given):
            start = width - len(numbers) if self.shape[1] == _NEW else 0
            made[row, start : start + len(numbers)] = numbers
        return made


def nothing_for(spec: AddedInput | EngineInput, batch: int, new: int) -> Array:
    """Return what to feed to an input where nothing is given."""
    known = {_BATCH: batch, _NEW: new}
    shape = [known.get(size, 0) if isinstance(size, str) else size for size in spec.shape]
    return np.full(shape, spec.unguided)


def described(inputs: Iterable[EngineInput]) -> str:
    """Return inputs as an engine's metadata hold them."""
    keys = ("shape", "unguided", "doc", "token")
    return json.dumps({spec.name: {key: getattr(spec, key) for key in keys} for spec in inputs})


def added_inputs(metadata: Mapping[str, str]) -> dict[str, AddedInput]:
    """Return the inputs that an engine's metadata describe, by name."""
    known = json.loads(metadata.get(ADDED_INPUTS, "{}"))
    return {
        name: AddedInput(name, tuple(entry["shape"]), float(entry["unguided"]), str(entry["doc"]), entry.get("token"))
        for name, entry in known.items()
    }
