"""Caches of texts that were read apart, behind each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokcc.backends.generation.decoder import Array, DecoderEngine, Past
from tokcc.errors import UsageError
from tokcc.passes.prompt.refill_plan import OLD, OLD_PLACES

__all__ = ["PADDING", "joined", "old_entries"]

_PAST = "past_key_values."
_PLACE, _SEGMENT = ".key_place", ".key_segment"
PADDING = -1
"""The segment of what is no token."""


def joined(pasts: Sequence[Past], starts: Sequence[int], segments: Sequence[int]) -> Past:
    """Put caches behind each other, for engines whose entries say where they stand (`store: {kind: placed}`).

    All of them have one batch size; rows that hold less than others are padded, and stay so.

    Args:
        pasts: What :meth:`DecoderEngine.call` returned for each text alone, from position 0 on.
        starts: The position at which each begins now.
        segments: The segment of each; of 0 are those that see, and are seen by, all others.

    Raises:
        UsageError: There are not as many of each, or the caches do not say where entries stand.
    """
    if not pasts or not len(pasts) == len(starts) == len(segments):
        raise UsageError(
            "caches cannot be put behind each other",
            needed="a position and a segment for each",
            found=f"{len(pasts)} caches, {len(starts)} positions, {len(segments)} segments",
        )
    if not any(name.endswith(_PLACE) for name in pasts[0]):
        raise UsageError(
            "the caches do not say where their entries stand",
            needed="an engine that was compiled with `kvlink`, or `store: {kind: placed}`",
        )
    made: Past = {}
    for name in pasts[0]:
        parts = []
        for past, start, segment in zip(pasts, starts, segments, strict=True):
            x = past[name]
            if name.endswith(_PLACE):
                x = x + start
            elif name.endswith(_SEGMENT):
                x = np.where(x == PADDING, x, segment)
            parts.append(x)
        made[name] = np.concatenate(parts, 2)
    return made


def old_entries(engine: DecoderEngine, pasts: Sequence[Past], starts: Sequence[int] | None = None) -> dict[str, Array]:
    """Return what a call takes as old entries of its first tokens, from caches of texts that were read apart.

    Args:
        engine: One that takes old entries (`cacheblend`).
        pasts: What :meth:`DecoderEngine.call` returned for each text, in their order in the call; of one batch size,
            without padding.
        starts: The position at which each text began when it was read; 0 by default.

    Raises:
        UsageError: The engine takes none, or there are not as many of each.
    """
    names = [name for name in engine.added if name.startswith(OLD)]
    if not names:
        raise UsageError(
            "the engine takes no old entries",
            needed="one that was compiled with `cacheblend`, or `reduce: {kind: recompute}`",
        )
    begins = [0] * len(pasts) if starts is None else list(starts)
    if not pasts or len(begins) != len(pasts):
        raise UsageError(
            "old entries cannot be put behind each other",
            needed="at least one cache, and a position for each",
            found=f"{len(pasts)} caches, {len(begins)} positions",
        )
    made = {name: np.concatenate([past[_PAST + name.removeprefix(OLD)] for past in pasts], 2) for name in names}
    batch = len(made[names[0]])
    lengths = [past[_PAST + names[0].removeprefix(OLD)].shape[2] for past in pasts]
    places = np.concatenate([np.arange(at, at + size) for at, size in zip(begins, lengths, strict=True)])
    return {OLD_PLACES: np.broadcast_to(places, (batch, len(places))), **made}
