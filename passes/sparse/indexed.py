"""What pieces have in common that read what the model's own indexer compares tokens by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import PrivateAttr

from tokcc.passes.piece import Piece

__all__ = ["OfIndexer"]


class OfIndexer(Piece):
    """Knows how wide the indexer's keys are, and reads single tokens: an indexer rates no blocks."""

    wants_index: ClassVar[bool] = True

    _width: int = PrivateAttr(default=1)

    def fitted(self, sizes: Mapping[str, int]) -> Self:
        """See :class:`Piece`."""
        made = self.model_copy()
        made._width = sizes["index_width"]
        return made

    def check(self, block_q: int, block_k: int) -> None:
        """Refuse blocks.

        Raises:
            ValueError: They are not single queries and keys.
        """
        if (block_q, block_k) != (1, 1):
            raise ValueError(f"single queries and keys, not blocks of {block_q} and {block_k}")
