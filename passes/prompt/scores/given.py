"""A score that the caller gives."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore

__all__ = ["Given"]


class Given(Guided, PromptScore):
    """A number for every token, from an input of the engine: what the encoder knows (VFlowOpt, arXiv:2508.05211).

    Attributes:
        name: The input, fp32 ``[B, S]``; what stands at other tokens than candidates is ignored.
    """

    kind: ClassVar[str] = "given"

    name: str = Field(default="importance", pattern=r"^[a-z][a-z0-9_]*$")

    def inputs(self) -> tuple[EngineInput, ...]:
        """See :class:`Guided`."""
        return (EngineInput(self.name, ("B", "S"), "how important each token of the image is"),)

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`Given`."""
        return cut.input(self.name, torch.float32)
