"""The pt2 backend: the reduced program, loadable where tokcc is installed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokcc.backends.arrays import to_array, to_tensor
from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import Check, Tolerance, check_parity, computed_in, runner
from tokcc.ir.program import Program

__all__ = ["save_pt2"]


def save_pt2(
    program: Program,
    path: Path,
    names: Sequence[str],
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
) -> list[Check]:
    """Write a ``torch.export`` archive, load it again and compare it with what the oracle gave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated pytree classes
        torch.export.save(program.to_exported(), path)
        run = runner(torch.export.load(path).module(check_guards=False), program)

    def engine(arrays: Mapping[str, Any]) -> dict[str, Any]:
        tensors = run({name: to_tensor(value) for name, value in arrays.items()})
        return {name: to_array(value) for name, value in zip(names, tensors, strict=True)}

    return check_parity(engine, names, feeds, expected, tolerance, made_in=computed_in(program))
