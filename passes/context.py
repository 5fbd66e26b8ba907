"""Tokens and a text, read together by trained layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from tokcc.passes.blocks import Blocks
from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec

__all__ = ["InContext"]


class InContext(TextGuided, Blocks):
    """A trained piece whose layers see all candidates and the text behind them, in both directions.

    Attributes:
        depth: Number of layers ``layers.<i>``, as in a checkpoint of the language model that they are copied from.
    """

    depth: int = Field(default=1, ge=1)

    def context_specs(self, sizes: Mapping[str, int]) -> list[TensorSpec]:
        """Return the layers' tensors; tokens and text have the model's width."""
        del sizes
        return [spec for i in range(self.depth) for spec in self.layer_specs(f"layers.{i}", "C")]

    def refined(self, cut: Cut) -> Any:
        """Return the candidates behind the layers, fp32 ``[B, M, C]``."""
        b = cut.b
        x = cut.inner(features(cut, "features", normalise=False))
        text, true, _ = self.read_text(cut, b.shape(x)[2])
        real = b.full([cut.batch.size, cut.candidates], True, torch.bool, cut.x)
        if cut.valid is not None:
            cut.ctx.fail("padding would stand between the tokens and the text", help="use a model without padding")
        mask = b.cat([real, true], 1)
        x = b.cat([x, text], 1)
        for i in range(self.depth):
            x = self.layer(b, x, f"layers.{i}", mask, cut.x)
        return b.slice(x, 1, 0, cut.candidates)
