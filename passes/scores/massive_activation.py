"""Tokens that are no sinks: those without massive activations."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.piece import Score

__all__ = ["MassiveActivation"]


class MassiveActivation(Score):
    """``phi_i = max_c |RMSNorm(h_i)_c|`` over the channels of sinks, without the norm's gain (VAR, arXiv:2503.03321).

    Attributes:
        channels: The channels; None = all of them. In LLaMA-2-7B sinks show in 1415 and 2533, in 13B in 2100 and 4743.
        sign: ``-1`` rates sinks low, so that they go first.
    """

    kind: ClassVar[str] = "massive_activation"

    channels: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    sign: Literal[1, -1] = -1

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, "features", normalise=False)  # fp32 [B, N, C]
        size = b.sqrt(b.add(b.mean(b.mul(x, x), 2, keepdim=True), 1e-6))
        if self.channels is not None:
            width = b.shape(x)[2]
            wrong = [channel for channel in self.channels if channel >= width]
            if wrong:
                cut.ctx.fail(
                    f"the stream has no channel {wrong[0]}",
                    needed=f"channels from 0 to {width - 1}",
                    help="give the channels of this model, or none: then all of them are looked at",
                )
            chosen = b.constant(f"{self.kind}_channels", torch.tensor(self.channels))
            x = b.call(torch.ops.aten.index_select.default, x, 2, chosen)
        phi = b.amax(b.call(torch.ops.aten.abs.default, b.div(x, size)), 2)
        return b.mul(phi, -1.0) if self.sign < 0 else phi
