"""Tables of kernel configurations: which tile, warps and stages a kernel runs with on an architecture.

``kernels/<op>/configs.yaml`` is written by ``tools/kernel_configs.py``, which compiles every candidate and leaves out
those that spill registers or ask for more shared memory than a block may have. The first of a list is the default: what
ahead-of-time compilation takes without running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

__all__ = ["ARCHS", "DTYPES", "SHARED_LIMITS", "Config", "choose", "dtype_of", "kind", "row", "table"]

SHARED_LIMITS: Mapping[int, int] = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a block may have, by architecture with a table (CUDA C++ programming guide)."""

ARCHS = tuple(SHARED_LIMITS)

# 8.6 and 8.9 have the shared memory of 12.0 and the same instructions, and 8.7, 10.3 and 12.1 are variants.
_SAME_AS: Mapping[int, int] = {86: 120, 87: 80, 89: 120, 101: 100, 103: 100, 110: 100, 121: 120}

DTYPES: Mapping[torch.dtype, str] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Config:
    """One way to run a kernel.

    Attributes:
        tile: The constants that are free, such as ``{"BQ": 64, "BK": 64}``.
        warps: Warps in a block.
        stages: Depth of the pipeline of loads.
    """

    tile: Mapping[str, int] = field(hash=False)
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Return what a launch is given."""
        return {**self.tile, "num_warps": self.warps, "num_stages": self.stages}


def kind(dtype: torch.dtype) -> str:
    """Return what rows say of a type: fp16 and bf16 compile to the same but for the instructions' names."""
    return "fp32" if dtype == torch.float32 else "half"


def dtype_of(name: str) -> torch.dtype:
    """Return the type of the name."""
    return next(dtype for dtype, known in DTYPES.items() if known == name)


@cache
def table(op: str) -> Mapping[str, Any]:
    """Return the table of an operation: kernel -> ``sm_XX`` -> row -> list of configurations with figures."""
    text = (Path(__file__).parent / op / "configs.yaml").read_text(encoding="utf-8")
    loaded: Mapping[str, Any] = yaml.safe_load(text)
    return loaded


@cache
def row(op: str, kernel: str, arch: int, name: str) -> tuple[Config, ...]:
    """Return the configurations of a row, the default first.

    An architecture without a table takes that of its kin, a newer one the newest that is not above it.

    Raises:
        KeyError: The operation has no such kernel or row.
    """
    archs = table(op)[kernel]
    own = arch if arch in ARCHS else _SAME_AS.get(arch, max(known for known in ARCHS if known <= max(arch, ARCHS[0])))
    return tuple(
        Config({key: value for key, value in entry.items() if key.isupper()}, entry["warps"], entry["stages"])
        for entry in archs[f"sm_{own}"][name]
    )


def choose(
    op: str, kernel: str, arch: int, name: str, fits: Callable[[Mapping[str, int]], bool] = lambda tile: True
) -> Config:
    """Return the first configuration whose tile fits, or the last: rows end with the smallest tile."""
    rows = row(op, kernel, arch, name)
    return next((config for config in rows if fits(config.tile)), rows[-1])
