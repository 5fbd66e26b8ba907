"""Importance by a small convolutional network on a language model's first attention map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.blocks import Blocks
from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.grid import grid_of
from tokcc.passes.ordering import around
from tokcc.passes.piece import Score
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec, activated

__all__ = ["TextMap"]

aten = torch.ops.aten


class TextMap(TextGuided, Blocks, Score):
    """The attention of text to tokens in the language model's first layer, read by convolutions (arXiv:2506.01097).

    Tokens and text go through the first layer's norm and its query and key projections; the text's attention to
    tokens, the mean over its rows, is an image with a channel for each head. Convolutions of 3 x 3 with GELU and one of
    1 x 1 make the score of it. Tensors: ``input_layernorm.weight`` ``[C]``, ``self_attn.q_proj``, ``self_attn.k_proj``,
    ``conv.layers.<i>.weight`` ``[out, in, 3, 3]``, ``conv.head.weight`` ``[1, in, 1, 1]``, and biases.

    Attributes:
        convolutions: How many of 3 x 3.
        rows: Rows of the text input, where they are to be a number.
        grid_rows: Rows of the token grid; None = it is square.
    """

    kind: ClassVar[str] = "text_map"

    convolutions: int = Field(default=3, ge=0)
    grid_rows: int | None = Field(default=None, ge=1)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`TextMap`."""
        del sizes
        channels: list[int | str] = [self.heads, *(f"channels_{i}" for i in range(self.convolutions))]
        found = [TensorSpec("input_layernorm.weight", ("C",)), *self.projection_specs("self_attn", "qk", "C")]
        for i in range(self.convolutions):
            found += [
                TensorSpec(f"conv.layers.{i}.weight", (channels[i + 1], channels[i], 3, 3)),
                TensorSpec(f"conv.layers.{i}.bias", (channels[i + 1],), optional=True),
            ]
        found += [
            TensorSpec("conv.head.weight", (1, channels[-1], 1, 1)),
            TensorSpec("conv.head.bias", (1,), optional=True),
        ]
        return found

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b, size = cut.b, cut.candidates
        rows, columns = grid_of(cut, self.grid_rows)
        x = cut.inner(features(cut, "features", normalise=False))
        text, true, count = self.read_text(cut, b.shape(x)[2])
        both = self.normed(b, b.cat([x, text], 1), "input_layernorm", "rms")
        probs = self.probs(
            b, b.slice(both, 1, size), both, "self_attn", self._seen(cut, true, size), cut.x, start=size
        )  # [B, H, T, M + T]
        own = b.where(b.unsqueeze(b.unsqueeze(true, 1), 3), b.slice(probs, 3, 0, size), 0.0)
        heads = b.div(b.sum(own, 2), b.unsqueeze(count, 2))  # [B, H, M]
        image = b.reshape(heads, [cut.batch.size, self.heads, rows, columns])
        for i in range(self.convolutions):
            image = activated(b, self._convolved(cut, image, f"conv.layers.{i}", 1), "gelu")
        return around(cut, b.reshape(self._convolved(cut, image, "conv.head", 0), [cut.batch.size, size]))

    def _seen(self, cut: Cut, true: Any, size: int) -> Any:
        """What rows of the text may attend to, bool ``[B, 1, T, M + T]``: all tokens, and true rows up to their own."""
        b = cut.b
        place = b.arange(b.size(true, 1), cut.x)
        past = b.compare("le", b.unsqueeze(place, 0), b.unsqueeze(place, 1))  # [T, T]
        among = b.logical_and(b.unsqueeze(true, 1), past)  # [B, T, T]
        tokens = b.full([cut.batch.size, b.size(true, 1), size], True, torch.bool, cut.x)
        return b.unsqueeze(b.cat([tokens, among], 2), 1)

    def _convolved(self, cut: Cut, image: Any, name: str, padding: int) -> Any:
        b = cut.b
        bias = self.tensor(b, f"{name}.bias") if self.has(f"{name}.bias") else None
        return b.call(aten.conv2d.default, image, self.tensor(b, f"{name}.weight"), bias, [1, 1], [padding, padding])
