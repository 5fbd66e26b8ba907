"""Drop what was not selected."""

from __future__ import annotations

from typing import ClassVar

from tokcc.passes.prompt.cut import PromptCut, Remaining, Selected
from tokcc.passes.prompt.piece import PromptReducer

__all__ = ["Drop"]


class Drop(PromptReducer):
    """The selected tokens stay as they are; the others are gone."""

    kind: ClassVar[str] = "drop"

    def reduce(self, cut: PromptCut, chosen: Selected) -> Remaining:
        """See :class:`Drop`."""
        return Remaining(cut.rows_of(cut.x, chosen.index), chosen.index, chosen.size)
