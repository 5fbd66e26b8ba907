"""Tokens that a state does not see."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.scan.cut import ScanCut
from tokcc.passes.scan.piece import ScanReducer

__all__ = ["PassBy"]


class PassBy(ScanReducer):
    """A step of size 0: decay 1 and update 0, so that the state passes the token unchanged.

    The token's own output row is read from that state like every other; convolution and gate see all tokens.
    """

    kind: ClassVar[str] = "pass_by"

    def reduce(self, cut: ScanCut, kept: Any) -> Any:
        """See :class:`PassBy`."""
        return cut.b.where(kept, cut.step, 0.0)
