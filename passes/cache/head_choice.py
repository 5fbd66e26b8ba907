"""The kind of piece that chooses key heads."""

from __future__ import annotations

from collections.abc import Mapping

from tokcc.passes.piece import Piece

__all__ = ["HeadChoice"]


class HeadChoice(Piece):
    """Chooses key heads of each layer."""

    def choose(self, kv_heads: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
        """Return the chosen key heads by layer.

        Args:
            kv_heads: The number of key heads of every layer of the model that is not sliding.

        Raises:
            ValueError: The choice does not fit the model.
        """
        raise NotImplementedError
