"""Inputs with the oracle's outputs, kept in the bundle so that it can be verified without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import numpy_feeds
from tokcc.errors import UsageError

__all__ = ["load_reference", "save_reference"]

MAX_BYTES = 32 * 2**20
"""Larger samples are left out: a bundle must not grow by its own check."""


def save_reference(
    path: Path, names: Sequence[str], feeds: Sequence[Feeds], expected: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Write inputs and oracle outputs."""
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    size = 0
    for number, (feed, outputs) in enumerate(zip(feeds, expected, strict=True)):
        made = {f"{number}/in/{name}": value for name, value in numpy_feeds(feed).items()}
        made |= {
            f"{number}/out/{name}": value.to(torch.float32).numpy() if value.dtype == torch.bfloat16 else value.numpy()
            for name, value in zip(names, outputs, strict=True)
        }
        size += sum(value.nbytes for value in made.values())
        if number and size > MAX_BYTES:
            break
        arrays |= made
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes no mapping


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
            pair[0 if side == "in" else 1][name] = torch.from_numpy(stored[key])
    return [pairs[number] for number in sorted(pairs)]
