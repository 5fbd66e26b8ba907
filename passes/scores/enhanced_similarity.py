"""Likeness of tokens and text behind a trained layer on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.blocks import Blocks
from tokcc.passes.cut import Cut
from tokcc.passes.features import features, normalised
from tokcc.passes.ordering import LOWEST, around
from tokcc.passes.piece import Score
from tokcc.passes.subset import candidates_valid
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec, mlp_specs

__all__ = ["EnhancedSimilarity"]


class EnhancedSimilarity(TextGuided, Blocks, Score):
    """``s_i = mean_t v_i . w_t`` with tokens v and text w enhanced, squashed and brought to unit length (FocusUI).

    Either side goes through self-attention, ``LayerNorm(x + attention)``, an MLP of the same width without a residual,
    ``tanh`` and L2 normalisation. Tensors, for ``tokens`` and ``text``: ``<side>.self_attn.{q,k,v,o}_proj``,
    ``<side>.norm.weight``, ``<side>.norm.bias``, ``<side>.mlp.layers.0``, ``<side>.mlp.layers.1``.

    Attributes:
        over_rows: How rows of the text are combined.
    """

    kind: ClassVar[str] = "enhanced_similarity"

    over_rows: Literal["mean", "max"] = "mean"

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`EnhancedSimilarity`."""
        del sizes
        return [spec for side, width in (("tokens", "C"), ("text", "D")) for spec in self._side_specs(side, width)]

    def _side_specs(self, side: str, width: str) -> list[TensorSpec]:
        # Queries and keys of the two sides may differ in width.
        own = {"query_width": f"{side}_width", "key_width": f"{side}_key_width"}
        attention = [
            TensorSpec(spec.name, tuple(own.get(str(part), part) for part in spec.shape), optional=spec.optional)
            for spec in self.projection_specs(f"{side}.self_attn", "qkvo", width)
        ]
        norm = [TensorSpec(f"{side}.norm.weight", (width,)), TensorSpec(f"{side}.norm.bias", (width,), optional=True)]
        return [*attention, *norm, *mlp_specs(f"{side}.mlp.layers", [width, f"{side}_hidden", "common"])]

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b = cut.b
        x = cut.inner(features(cut, "features", normalise=False))
        rows, true, count = self.read_text(cut, self.weight("text.norm.weight").shape[0])
        v = self._enhanced(cut, x, "tokens", candidates_valid(cut))  # [B, M, E]
        w = self._enhanced(cut, rows, "text", true)  # [B, T, E]
        likeness = b.matmul(v, b.transpose(w, 1, 2))  # [B, M, T]
        there = b.unsqueeze(true, 1)
        if self.over_rows == "max":
            return around(cut, b.amax(b.where(there, likeness, LOWEST), 2))
        return around(cut, b.div(b.sum(b.where(there, likeness, 0.0), 2), count))

    def _enhanced(self, cut: Cut, x: Any, side: str, mask: Any) -> Any:
        b = cut.b
        x = b.add(x, self.attend(b, x, x, f"{side}.self_attn", mask, cut.x))
        x = self.mlp(b, self.normed(b, x, f"{side}.norm", "layer", 1e-5), f"{side}.mlp.layers", 2, "gelu")
        return normalised(b, b.call(torch.ops.aten.tanh.default, x))
