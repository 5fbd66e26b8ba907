"""A trained predictor that sees a token and the mean of all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.half_mean import half_mean
from tokcc.passes.piece import Score
from tokcc.passes.trained import TensorSpec, Trained, activated, linear_specs, mlp_specs, second_minus_first

__all__ = ["LocalGlobal"]


class LocalGlobal(Trained, Score):
    """DynamicViT's prediction module (arXiv:2106.02034, section 3.2), one for each chosen layer.

    ``z = GELU(W LN(x))`` over the candidates; its first half is the token's own, the mean over tokens of its second
    half is what all share; three linear layers with GELU between them give two logits, keep and drop.

    Tensors of the i-th chosen layer, from 0: ``stages.<i>.norm.weight`` and ``.bias``, ``stages.<i>.embed.weight``
    ``[hidden, C]`` and ``.bias``, ``stages.<i>.layers.<0..2>.weight`` and ``.bias``, the last ``[2, ...]``.
    """

    kind: ClassVar[str] = "local_global"

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`LocalGlobal`."""
        found: list[TensorSpec] = []
        for stage in (f"stages.{i}" for i in range(sizes["stages"])):
            found += [
                TensorSpec(f"{stage}.norm.weight", ("C",)),
                TensorSpec(f"{stage}.norm.bias", ("C",), optional=True),
            ]
            found += linear_specs(f"{stage}.embed", "embedded", "C")
            found += mlp_specs(f"{stage}.layers", ["embedded", "half", "quarter", 2])
        return found

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``: the logit of keeping minus that of dropping."""
        b = cut.b
        stage = f"stages.{cut.stage}"
        x = self.normed(b, b.cast(cut.x, torch.float32), f"{stage}.norm", "layer", 1e-5)
        z = activated(b, self.linear(b, x, f"{stage}.embed"), "gelu")  # [B, N, E]
        y = half_mean(b, z, cut.inner(z), None if cut.valid is None else cut.inner(cut.valid))
        drop_minus_keep = second_minus_first(b, self.mlp(b, y, f"{stage}.layers", 3, "gelu"))
        return b.mul(drop_minus_keep, -1.0)
