"""Importance by a small trained network on each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.piece import Score
from tokcc.passes.trained import TensorSpec, Trained, activated, linear_specs

__all__ = ["Mlp"]


class Mlp(Trained, Score):
    """A multilayer perceptron ``C -> ... -> 1`` on every token's features, with trained weights.

    Tensors: ``layers.<i>.weight`` ``[out, in]`` and, where there are any, ``layers.<i>.bias``; with a norm also
    ``norm.weight`` and, where there is one, ``norm.bias``.

    Attributes:
        depth: Number of linear layers.
        activation: Between them.
        norm: In front of them.
        outputs: 1, or 2: then the score is the second logit minus the first.
    """

    kind: ClassVar[str] = "mlp"

    depth: int = Field(default=2, ge=1, le=16)
    activation: Literal["gelu", "silu", "relu"] = "gelu"
    norm: Literal["none", "layer", "rms"] = "none"
    outputs: Literal[1, 2] = 1

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Mlp`."""
        del sizes
        widths: list[int | str] = ["C", *(f"hidden_{i}" for i in range(self.depth - 1)), self.outputs]
        found = [s for i in range(self.depth) for s in linear_specs(f"layers.{i}", widths[i + 1], widths[i])]
        if self.norm != "none":
            found += [TensorSpec("norm.weight", ("C",)), TensorSpec("norm.bias", ("C",), optional=True)]
        return found

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, "features", normalise=False)  # fp32 [B, N, C]
        if self.norm != "none":
            x = self.normed(b, x, "norm", self.norm)
        for i in range(self.depth):
            x = self.linear(b, activated(b, x, self.activation) if i else x, f"layers.{i}")
        if self.outputs == 1:
            return b.squeeze(x, 2)
        no, yes = (b.call(torch.ops.aten.select.int, x, 2, i) for i in (0, 1))
        return b.sub(yes, no)
