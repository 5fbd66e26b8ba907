"""The three kinds of pieces for scans."""

from __future__ import annotations

from typing import Any

from tokcc.passes.piece import Piece
from tokcc.passes.scan.cut import ScanCut

__all__ = ["ScanReducer", "ScanScore", "ScanSelector"]


class ScanScore(Piece):
    """Rates the tokens of a scan."""

    def emit(self, cut: ScanCut) -> Any:
        """Return ``[S, B, D, 1]``, larger = more important for the channel."""
        raise NotImplementedError


class ScanSelector(Piece):
    """Chooses the tokens that each channel's state takes in."""

    def check(self, tokens: int) -> None:
        """Make sure that the parameters are ones for a step.

        Args:
            tokens: How long the texts are that are scanned whole.

        Raises:
            ValueError: They are not.
        """

    def acts(self, layer: int) -> bool:
        """Return False for a layer where every token is taken in, whatever the input."""
        del layer
        return True

    def shortest(self, tokens: int) -> int:
        """Return how long the shortest texts are that are not scanned whole."""
        return tokens + 1

    def select(self, cut: ScanCut, score: Any) -> Any:
        """Return bool ``[S, B, D, 1]``: taken in."""
        raise NotImplementedError


class ScanReducer(Piece):
    """Says what a scan does with the tokens that were not chosen."""

    def reduce(self, cut: ScanCut, kept: Any) -> Any:
        """Return the step sizes to scan with, ``[S, B, D, 1]``."""
        raise NotImplementedError
