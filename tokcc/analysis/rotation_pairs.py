"""Which channels of a head a model turns together: tried out on its own rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.analysis.rotation import Rotation, find_rotation
from tokcc.ir.program import Program

__all__ = ["Pairs", "channel_pairs", "pairs_of", "turned_pairs"]

Pairs = tuple[tuple[int, int], ...]
"""The pairs of channels of a head."""
_POSITION = 5
"""Where channels are turned: near enough for every table, and of no frequency a whole number of turns."""


def channel_pairs(program: Program, key: fx.Node) -> Pairs | None:
    """Return the pairs of channels of a layer's keys, each as one frequency turns it; None where nothing is turned.

    Models lay them out differently (``i`` and ``i + D / 2``, or ``2 * i`` and ``2 * i + 1``), and some turn a part of
    the channels alone: the others, which no position changes, are taken two and two as they stand.

    Args:
        program: The decoder.
        key: What enters the cache, ``[B, Hkv, S, D]``.
    """
    rotation = find_rotation(program, key)
    return None if rotation is None else turned_pairs(program, rotation)


def turned_pairs(program: Program, rotation: Rotation) -> Pairs | None:
    """Return the pairs that a rotation turns; None where it mixes more than two channels, or cannot be repeated."""
    _, heads, _, width = rotation.source.meta["val"].shape
    env = _outside(program, rotation, (1, heads, width, width))
    if env is None:
        return None
    dtype = rotation.source.meta["val"].dtype
    each = torch.eye(width, dtype=dtype).expand(1, heads, width, width).contiguous()
    places = torch.full((1, width), _POSITION, dtype=rotation.positions.meta["val"].dtype)
    with torch.no_grad():
        moved = rotation.replay(lambda target, *args, **kwargs: target(*args, **kwargs), each, places, env)
    return pairs_of(moved[0, 0] != 0)


def pairs_of(mixes: torch.Tensor) -> Pairs | None:
    """Return the pairs of a table bool ``[D, D]`` of where each channel's number goes; None for other than pairs."""
    width = len(mixes)
    together = (mixes | mixes.T) & ~torch.eye(width, dtype=torch.bool)
    partners = [row.nonzero().flatten().tolist() for row in together]
    alone = [channel for channel, found in enumerate(partners) if not found]
    if any(len(found) > 1 for found in partners) or len(alone) % 2:
        return None
    turned = [(channel, found[0]) for channel, found in enumerate(partners) if found and channel < found[0]]
    return (*turned, *zip(alone[::2], alone[1::2], strict=True))


def _outside(program: Program, rotation: Rotation, shape: tuple[int, ...]) -> dict[fx.Node, Any] | None:
    """Return what a rotation reads besides, for a source of a shape; None for what is neither a constant nor a size."""
    sizes = dict(zip(map(str, rotation.source.meta["val"].shape), shape, strict=True))
    env: dict[fx.Node, Any] = {}
    for node in rotation.outside:
        tensor = program.tensor_of(node) if node.op == "placeholder" else None
        value = tensor if tensor is not None else sizes.get(str(node.meta["val"]))
        if value is None:
            return None
        env[node] = value
    return env
