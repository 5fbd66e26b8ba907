"""Token vectors that similarity is measured on."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cut import Cut

__all__ = ["FeatureKind", "features", "normalised", "side_by_side"]

FeatureKind = Literal["keys", "values", "features", "outputs"]
"""Keys or values of the layer's attention, the stream itself, or what the rest of the program makes of its tokens."""


def normalised(b: Builder, x: Any) -> Any:
    """L2-normalise the last axis, written with plain operations (runtimes get ReduceL2 wrong)."""
    squares = b.sum(b.mul(x, x), len(b.shape(x)) - 1, keepdim=True)
    return b.div(x, b.sqrt(b.clamp_min(squares, 1e-24)))


def side_by_side(b: Builder, x: Any) -> Any:
    """Put all heads side by side: ``[B, H, N, D]`` -> ``[B, N, H * D]``."""
    shape = b.shape(x)
    return b.reshape(b.transpose(x, 1, 2), [b.size(x, 0), b.size(x, 2), shape[1] * shape[3]])


def features(cut: Cut, of: FeatureKind, heads: Literal["mean", "concat"] = "mean", *, normalise: bool = True) -> Any:
    """Return fp32 vectors ``[B, N, D]`` of the current tokens.

    Args:
        cut: The cut.
        of: Which vectors.
        heads: Mean over heads, or all heads side by side.
        normalise: To unit length.
    """
    b = cut.b
    if of == "features":
        x = cut.x
    elif of == "outputs":
        x = _outputs(cut)
    else:
        view = cut.attention()
        x = view.key if of == "keys" else view.value  # [B, H, N, D]
        x = b.mean(x, 1) if heads == "mean" else side_by_side(b, x)
    x = b.cast(x, torch.float32)
    return normalised(b, x) if normalise else x


def _outputs(cut: Cut) -> Any:
    """Return ``[B, N, D]``; protected tokens are no candidates and stay zero."""
    b = cut.b
    x = cut.ahead(cut.inner(cut.x), b.arange(cut.candidates, cut.x))
    width = b.size(x, 2)
    parts = [b.full([cut.batch.size, count, width], 0.0, b.dtype(x), cut.x) for count in (cut.first, cut.last)]
    return b.cat([*[parts[0]] * bool(cut.first), x, *[parts[1]] * bool(cut.last)], 1)
