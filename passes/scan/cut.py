"""What pieces of scans see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokcc.ir.builder import Builder

__all__ = ["ScanCut"]


@dataclass(frozen=True)
class ScanCut:
    """The input of one layer's scan in one call.

    Attributes:
        b: Emits operations.
        layer: 0-based.
        step: The step sizes ``[S, B, D, 1]``, as the scan is about to read them.
        seen: int64 ``[B]``: real tokens of the text so far, the call's included.
        tokens: How long the texts are that are scanned whole.
    """

    b: Builder
    layer: int
    step: Any
    seen: Any
    tokens: int
