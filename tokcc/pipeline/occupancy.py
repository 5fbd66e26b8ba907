"""Which positions of a prompt are left in the caches, found by their keys, or by their values where keys are turned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokcc.pipeline.reading import Array, Engine, Reading
from tokcc.report.schema import LayerOccupancy, Occupancy

__all__ = ["Followed", "follow", "prompt_length"]

_KEYS = re.compile(r"past_key_values\.(\d+)\.key(?:_\d+)?")
_VALUES = re.compile(r"past_key_values\.(\d+)\.value(?:_\d+)?")
_CELLS = 128
_LONGEST = 2048
_LOGITS = 2**28
"""Most logits of a call: the prompt is read in one."""
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Followed:
    """Positions that are left.

    Attributes:
        kept: bool ``[Hkv, context]`` by layer.
        context: Tokens of the prompt.
        unknown: Layers whose entries are not found among the whole cache's.
    """

    kept: Mapping[int, Flags]
    context: int
    unknown: tuple[int, ...]

    @property
    def note(self) -> str | None:
        """What cannot be shown, or None."""
        if self.unknown:
            where = ", ".join(map(str, self.unknown))
            what = "entries are merged or rounded there, or several are the same"
            return f"the picture of what caches keep leaves out layers {where}: {what}"
        if all(flags.all() for flags in self.kept.values()):
            return f"the caches keep everything of a prompt of {self.context} tokens: there is no picture of it"
        return None

    def facts(self) -> Occupancy | None:
        """Return the shares for the report; None when there is nothing to see."""
        if not self.kept or all(flags.all() for flags in self.kept.values()):
            return None
        cell = -(-self.context // _CELLS)
        starts = range(0, self.context, cell)
        rows = [
            LayerOccupancy(layer=layer, kept=tuple(round(float(flags[:, s : s + cell].mean()), 4) for s in starts))
            for layer, flags in sorted(self.kept.items())
        ]
        return Occupancy(context=self.context, cell=cell, layers=tuple(rows))


def prompt_length(after: Mapping[str, Array], longest: int, vocabulary: int) -> int:
    """Return how long a prompt should be so that something is evicted from it, as far as that is known and cheap.

    Args:
        after: The engine's cache after a text of some length.
        longest: Most tokens that there are.
        vocabulary: Number of logits of a token.
    """
    slots = max((value.shape[2] for name, value in after.items() if _KEYS.fullmatch(name)), default=0)
    return max(1, min(max(2 * slots, 64), longest, _LONGEST, max(_LOGITS // max(vocabulary, 1), 64)))


def follow(baseline: Engine, engine: Engine, ids: Array, *, batch: int = 1) -> Followed:
    """Read a prompt in one call with both engines, and look for the entries of one cache in the other.

    A prompt is attended to as a whole before anything is evicted, so both have computed the same keys and values: those
    that are left are found again, but for rounding. A layer where one is not, or is one of several equal ones, is
    unknown.

    Args:
        baseline: The engine with the whole cache.
        engine: The other one.
        ids: The prompt.
        batch: Rows; the first one is looked at.
    """
    before, after = Reading(baseline, batch), Reading(engine, batch)
    before.read(ids)
    after.read(ids)
    kept: dict[int, Flags] = {}
    everyone: set[int] = set()
    for pattern in (_KEYS, _VALUES):
        whole, left = _by_layer(before.past, pattern), _by_layer(after.past, pattern)
        everyone |= whole.keys()
        for layer in whole.keys() - kept.keys():
            flags = _kept(whole[layer][0], left.get(layer, []), len(ids))
            if flags is not None:
                kept[layer] = flags
    return Followed(kept, len(ids), tuple(sorted(everyone - kept.keys())))


def _by_layer(past: Mapping[str, Array], pattern: re.Pattern[str]) -> dict[int, list[Array]]:
    """Return the first row of each tensor of that name, by layer."""
    found: dict[int, list[Array]] = {}
    for name, value in past.items():
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), []).append(value[0])
    return found


def _kept(whole: Array, parts: list[Array], context: int) -> Flags | None:
    """Return which positions the parts of a layer hold, head by head; None when an entry is not recognised."""
    heads, rows, width = whole.shape
    if any(part.dtype != whole.dtype or part.shape[2] != width for part in parts):
        return None
    if sum(len(part) for part in parts) != heads:
        return None
    flags = np.zeros((heads, context), np.bool_)
    free = list(range(heads))
    for part in parts:
        for entries in part:
            if np.any(whole != 0, axis=2).all():
                entries = entries[np.any(entries != 0, axis=1)]  # slots that hold nothing yet
            for head in free:
                found = _places(entries, whole[head])
                if found is not None:
                    # A sliding window's cache holds the last tokens only.
                    flags[head, found + (context - rows)] = True
                    free.remove(head)
                    break
            else:
                return None
    return flags


def _places(entries: Array, rows: Array) -> npt.NDArray[np.int64] | None:
    """Return where each entry is among the rows; None unless each is there exactly once, at a place of its own."""
    a, b = entries.astype(np.float64), rows.astype(np.float64)
    tolerance = 1e-2 if entries.dtype == np.float16 else 1e-3
    squares = (a * a).sum(1)
    distance = squares[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    near = distance <= (tolerance**2) * squares[:, None]
    if not (near.sum(1) == 1).all():
        return None
    places = near.argmax(1)
    return places if len(set(places.tolist())) == len(places) else None
