"""Engines that can be run here, whatever made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["AOTI", "EngineSession", "ending", "open_engine"]

Array = npt.NDArray[Any]

AOTI = ".aoti.pt2"
"""How the names of AOTInductor's packages end."""


class EngineSession(Protocol):
    """A loaded engine."""

    inputs: list[str]
    outputs: list[str]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""


def ending(path: Path) -> str:
    """Return how an engine's name ends: ``.onnx`` or ``.aoti.pt2``."""
    return AOTI if path.name.endswith(AOTI) else path.suffix


def open_engine(path: Path, *, threads: int = 0) -> EngineSession:
    """Load an engine on the CPU.

    Args:
        path: An ONNX model, or a package of AOTInductor.
        threads: Threads inside an operation; 0 = the runtime's default.
    """
    if ending(path) == AOTI:
        from tokcc.backends.aoti import AotiSession

        return AotiSession(path, threads=threads)
    from tokcc.backends.ort import Session

    return Session(path, threads=threads)
