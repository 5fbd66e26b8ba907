"""Importance by a small trained network on each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.piece import Score
from tokcc.passes.trained import TensorSpec, Trained, mlp_specs, second_minus_first

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
        found = mlp_specs("layers", widths)
        if self.norm != "none":
            found += [TensorSpec("norm.weight", ("C",)), TensorSpec("norm.bias", ("C",), optional=True)]
        return found

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        x = features(cut, "features", normalise=False)  # fp32 [B, N, C]
        if self.norm != "none":
            x = self.normed(b, x, "norm", self.norm)
        x = self.mlp(b, x, "layers", self.depth, self.activation)
        return b.squeeze(x, 2) if self.outputs == 1 else second_minus_first(b, x)
