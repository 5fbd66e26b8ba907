"""Models that cap their logits."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["capped"]


def capped(b: Builder, logits: Any, cap: float) -> Any:
    """Return ``cap * tanh(logits / cap)``; the logits themselves for a cap of 0, which is none."""
    return b.mul(b.call(torch.ops.aten.tanh.default, b.div(logits, cap)), cap) if cap else logits
