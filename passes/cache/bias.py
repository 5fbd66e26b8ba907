"""The kind of piece that says what is added to the logits of an attention."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.ir.builder import Builder
from tokcc.passes.piece import Piece

__all__ = ["AttentionBias"]


class AttentionBias(Piece):
    """Adds a number to the logits of every slot, the same for all queries.

    Attributes:
        first: It is about the first token of a text, which no step may take out.
    """

    first: ClassVar[bool] = False

    @property
    def nothing(self) -> bool:
        """Whether it adds nothing with these parameters."""
        return False

    def emit(self, b: Builder, real: Any) -> Any:
        """Return what is added, fp32 ``[B, L]``.

        Args:
            b: The builder.
            real: bool ``[B, L]``: slots that are not padding.
        """
        raise NotImplementedError
