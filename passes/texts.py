"""Pieces that are guided by a text: rows of vectors, as many of them as the longest text of a batch needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.inputs import EngineInput, Guided

__all__ = ["TextGuided", "TextVector"]


class TextGuided(Guided):
    """A piece that reads the vectors of a text.

    Attributes:
        text: Name of the input, fp32 ``[B, T, D]``; beside it stands ``<text>_count``, int64 ``[B]``: how many rows of
            each sample are true ones. What stands in the others does not matter.
        rows: T, where it is to be a number; else it is dynamic.
    """

    text: str = Field(default="text", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    rows: int | None = Field(default=None, ge=1)

    def inputs(self) -> Sequence[EngineInput]:
        """Return the rows and their count."""
        rows: int | str = self.rows or "T"
        return (
            EngineInput(self.text, ("B", rows, "D"), "vectors of the text that guides the selection, one row each"),
            EngineInput(
                f"{self.text}_count",
                ("B",),
                f"number of rows of `{self.text}` that are true ones, at least 1",
                torch.int64,
                unguided=1,
                low=1,
                high=rows,
            ),
        )

    def read_text(self, cut: Cut, width: int) -> tuple[Any, Any, Any]:
        """Return the rows fp32 ``[B, T, width]``, which are true ones bool ``[B, T]``, and how many fp32 ``[B, 1]``."""
        b = cut.b
        sizes = {"B": cut.batch.size, "D": width}
        rows = self.read(b, self.text, sizes, cut.x)
        count = b.unsqueeze(self.read(b, f"{self.text}_count", sizes, cut.x), 1)
        true = b.compare("lt", b.unsqueeze(b.arange(b.size(rows, 1), cut.x), 0), count)
        return rows, true, b.cast(count, torch.float32)


class TextVector(Guided):
    """A piece that reads one vector of a text.

    Attributes:
        text: Name of the input, fp32 ``[B, D]``.
    """

    text: str = Field(default="text_vector", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")

    def inputs(self) -> Sequence[EngineInput]:
        """Return the vector."""
        return (EngineInput(self.text, ("B", "D"), "a vector of the text that guides the reduction"),)

    def read_vector(self, cut: Cut, width: int) -> Any:
        """Return the vector, fp32 ``[B, width]``."""
        return self.read(cut.b, self.text, {"B": cut.batch.size, "D": width}, cut.x)
