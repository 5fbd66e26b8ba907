"""Token vectors that similarity is measured on."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cut import Cut

__all__ = ["FeatureKind", "features", "normalised"]

FeatureKind = Literal["keys", "values", "features"]


def normalised(b: Builder, x: Any) -> Any:
    """L2-normalise the last axis, written with plain operations (runtimes get ReduceL2 wrong)."""
    squares = b.sum(b.mul(x, x), len(b.shape(x)) - 1, keepdim=True)
    return b.div(x, b.sqrt(b.clamp_min(squares, 1e-24)))


def features(cut: Cut, of: FeatureKind, heads: Literal["mean", "concat"] = "mean", *, normalise: bool = True) -> Any:
    """Return fp32 vectors ``[B, N, D]`` of the current tokens.

    Args:
        cut: The cut.
        of: Keys or values of the layer's attention, or the stream itself.
        heads: Mean over heads, or all heads side by side.
        normalise: To unit length.
    """
    b = cut.b
    if of == "features":
        x = cut.x
    else:
        view = cut.attention()
        x = view.key if of == "keys" else view.value  # [B, H, N, D]
        if heads == "mean":
            x = b.mean(x, 1)
        else:
            shape = b.shape(x)
            x = b.reshape(b.transpose(x, 1, 2), [b.size(x, 0), b.size(x, 2), shape[1] * shape[3]])
    x = b.cast(x, torch.float32)
    return normalised(b, x) if normalise else x
