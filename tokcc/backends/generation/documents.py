"""Caches of texts that were read apart, behind each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokcc.backends.generation.decoder import Past
from tokcc.errors import UsageError

__all__ = ["PADDING", "joined"]

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
