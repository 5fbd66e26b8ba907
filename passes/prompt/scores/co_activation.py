"""Neurons that a token shares with a late one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore

__all__ = ["CoActivation"]


class CoActivation(PromptScore):
    """In how many neurons of the layer's MLP both a token and a late one are above 0 (CoreMatching, 2505.19235).

    Attributes:
        reference: Which late one, counted from the end: 1 = the last.
    """

    kind: ClassVar[str] = "co_activation"

    reference: int = Field(default=5, ge=1)

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`CoActivation`."""
        b = cut.b
        hidden = cut.branch(cut.layer, "mlp").hidden
        # Counts in fp32: half precision does not hold them.
        active = b.cast(b.compare("gt", hidden, 0.0), torch.float32)  # [B, N, F]
        late = b.add(b.arange(1, cut.x), b.sub_sizes(cut.tokens, self.reference))
        late = b.clamp_min(late, 0)  # in a call of a few tokens nothing is dropped
        reference = b.call(torch.ops.aten.index_select.default, active, 1, late)  # [B, 1, F]
        return b.sum(b.mul(active, reference), 2)
