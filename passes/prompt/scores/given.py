"""A score that the caller gives."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.cache.smoothing import Pool, smoothed
from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore

__all__ = ["Given"]


class Given(Guided, PromptScore):
    """A number for every token, from an input of the engine.

    What an encoder knows (VFlowOpt, arXiv:2508.05211), or what a draft model attends to (SpecPC, arXiv:2506.08373).

    Attributes:
        name: The input, fp32 ``[B, S]``; what stands at padding is ignored, and without a pool what stands at other
            tokens than candidates.
        pool: How neighbours are smoothed; beyond the ends there are zeros for a mean, and nothing for a maximum.
        kernel: Width of the pool; of an even one, one more to the right than to the left.
    """

    kind: ClassVar[str] = "given"

    name: str = Field(default="importance", pattern=r"^[a-z][a-z0-9_]*$")
    pool: Pool = "none"
    kernel: int = Field(default=1, ge=1)

    def inputs(self) -> tuple[EngineInput, ...]:
        """See :class:`Guided`."""
        return (EngineInput(self.name, ("B", "S"), "how important each token is"),)

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`Given`."""
        b, given = cut.b, cut.input(self.name, torch.float32)
        if self.pool == "none" or self.kernel == 1:
            return given
        own = b.where(cut.real, given, 0.0 if self.pool == "avg" else LOWEST)
        return b.squeeze(smoothed(b, b.unsqueeze(own, 1), self.pool, self.kernel), 1)
