"""Giving all tokens back on the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tokcc.analysis.walk import Walk
from tokcc.ir.value import Value

__all__ = ["GiveBack"]


@dataclass(frozen=True)
class GiveBack:
    """An action where the stream ends, so that the final norm and heads see all tokens."""

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Restore every reduced axis."""
        del node
        if not value.reduced:
            return value
        with walk.builder.inserting("restore"):
            return walk.restored(value)
