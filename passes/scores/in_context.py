"""Importance by trained layers that see tokens and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from tokcc.passes.context import InContext
from tokcc.passes.cut import Cut
from tokcc.passes.ordering import around
from tokcc.passes.piece import Score
from tokcc.passes.trained import TensorSpec, mlp_specs, second_minus_first

__all__ = ["InContextScore"]


class InContextScore(InContext, Score):
    """Bidirectional layers over tokens and text, RMSNorm, then an MLP (CaCoVID, arXiv:2602.01649; EchoingPixels).

    Tensors: ``layers.<i>`` (see :mod:`tokcc.passes.blocks`), ``norm.weight``, and ``<head>.layers.<i>``.

    Attributes:
        head: Name of the MLP.
        head_depth: Its linear layers; the widths between are what the file says.
        outputs: 1, or 2: then the score is the second logit minus the first.
        frames: Score the mean state of each of so many frames instead, the same for all of its tokens.
        activation: Between the MLP's layers.
    """

    kind: ClassVar[str] = "in_context"

    head: str = "head"
    head_depth: int = Field(default=2, ge=1)
    outputs: Literal[1, 2] = 1
    frames: int | None = Field(default=None, ge=1)
    activation: Literal["gelu", "silu", "relu"] = "silu"

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`InContextScore`."""
        between = [f"{self.head}_{i}" for i in range(self.head_depth - 1)]
        return [
            *self.context_specs(sizes),
            TensorSpec("norm.weight", ("C",)),
            *mlp_specs(f"{self.head}.layers", ["C", *between, self.outputs]),
        ]

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b = cut.b
        x = self.normed(b, self.refined(cut), "norm", "rms")  # [B, M, C]
        size = cut.candidates
        if self.frames is not None:
            if not isinstance(size, int) or size % self.frames:
                cut.ctx.fail(f"the tokens are not those of {self.frames} frames", help="set the parameter `frames`")
            x = b.mean(b.reshape(x, [cut.batch.size, self.frames, size // self.frames, b.shape(x)[2]]), 2)
        y = self.mlp(b, x, f"{self.head}.layers", self.head_depth, self.activation)
        rating = b.squeeze(y, 2) if self.outputs == 1 else second_minus_first(b, y)
        if self.frames is not None:
            assert isinstance(size, int)
            wide = b.expand(b.unsqueeze(rating, 2), [-1, -1, size // self.frames])
            rating = b.reshape(wide, [cut.batch.size, size])
        return around(cut, rating)
