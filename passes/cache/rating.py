"""Pieces that rate tokens as they come, for storages that hold some in a better form than others."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.piece import Piece

__all__ = ["TokenRating"]


class TokenRating(Piece):
    """Rates the tokens of a call, each once and for all heads of the layer.

    Attributes:
        reads_ids: Reads the tokens themselves, ``ids`` of the cut.
    """

    reads_ids: ClassVar[bool] = False

    def emit(self, cut: CacheCut) -> Any:
        """Return fp32 ``[B, 1, S]``; larger = more important."""
        raise NotImplementedError
