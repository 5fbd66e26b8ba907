"""More or less attention to the first token."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.bias import AttentionBias
from tokcc.passes.cache.visible import slot_rank

__all__ = ["FirstKey"]


class FirstKey(AttentionBias):
    """The first token's attention times ``gamma``, and all of it divided by its sum again (arXiv:2505.11739).

    ``a0' = gamma * a0 / (1 + (gamma - 1) * a0)`` and ``aj' = aj / (1 + (gamma - 1) * a0)`` are what a softmax makes of
    logits to the first of which ``log(gamma)`` is added. The first token is each row's own, behind its padding.

    Attributes:
        gamma: Above 1, what the other tokens get is less and flatter; below 1, more. 1 = nothing changes.
    """

    kind: ClassVar[str] = "first_key"
    first: ClassVar[bool] = True

    gamma: float = Field(gt=0, allow_inf_nan=False)

    @property
    def nothing(self) -> bool:
        """See :class:`AttentionBias`."""
        return self.gamma == 1.0

    def emit(self, b: Builder, real: Any) -> Any:
        """See :class:`FirstKey`."""
        first = b.logical_and(b.compare("eq", slot_rank(b, real), 0), real)
        return b.where(first, math.log(self.gamma), 0.0)
