"""Inputs with the oracle's outputs, kept in the bundle so that it can be verified without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokcc.backends.arrays import to_array
from tokcc.backends.feeds import Feeds
from tokcc.errors import UsageError

__all__ = ["load_reference", "save_reference"]

MAX_BYTES = 32 * 2**20
"""Larger samples are left out: a bundle must not grow by its own check."""
_AS_BITS = ".bfloat16"


def save_reference(
    path: Path, names: Sequence[str], feeds: Sequence[Feeds], expected: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Write inputs and oracle outputs."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    size = 0
    for number, (feed, outputs) in enumerate(zip(feeds, expected, strict=True)):
        made = dict(_stored(f"{number}/in", name, value) for name, value in feed.items())
        made |= dict(_stored(f"{number}/out", name, value) for name, value in zip(names, outputs, strict=True))
        size += sum(value.nbytes for value in made.values())
        if number and size > MAX_BYTES:
            break
        arrays |= made
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes no mapping


def _stored(side: str, name: str, value: torch.Tensor) -> tuple[str, npt.NDArray[Any]]:
    """Return what one tensor is in the file: numpy's files know no bfloat16, and have its bits."""
    if value.dtype == torch.bfloat16:
        return f"{side}{_AS_BITS}/{name}", to_array(value).view(np.int16)
    return f"{side}/{name}", to_array(value)


def load_reference(path: Path) -> list[tuple[Feeds, dict[str, torch.Tensor]]]:
    """Return (inputs, outputs) pairs."""
    if not path.is_file():
        raise UsageError(
            "the bundle holds no reference to verify with",
            needed="reference.npz",
            help="compile it again with the onnx backend",
        )
    pairs: dict[int, tuple[Feeds, dict[str, torch.Tensor]]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, side, name = key.split("/", 2)
            pair = pairs.setdefault(int(number), ({}, {}))
            value = torch.from_numpy(stored[key])
            if side.endswith(_AS_BITS):
                side, value = side.removesuffix(_AS_BITS), value.view(torch.bfloat16)
            pair[0 if side == "in" else 1][name] = value
    return [pairs[number] for number in sorted(pairs)]
