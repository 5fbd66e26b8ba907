"""A trained score of the tokens of a pyramid of feature maps, from the coarsest map down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.half_mean import half_mean
from tokcc.passes.ordering import around
from tokcc.passes.piece import Score
from tokcc.passes.trained import TensorSpec, Trained, activated, linear_specs, mlp_specs

__all__ = ["Foreground"]

Side = Annotated[int, Field(ge=1)]


class Foreground(Trained, Score):
    """How likely a token is part of an object (Focus-DETR, arXiv:2307.12612, section 3.1).

    For the map l of tokens x, coarsest first: ``f_l = mlp(x_l)``, where ``x_l`` is first changed to
    ``x_l + alpha_l (x_l * up(f_{l+1}))``; ``up`` is bilinear with aligned corners. The network is a norm, a linear
    layer with GELU, half of whose channels become their mean over the map's tokens, and three linear layers with GELU
    between them; the score is its logit.

    Tensors: ``norm.weight`` ``[C]`` and ``.bias``, ``embed.weight`` ``[hidden, C]`` and ``.bias``,
    ``layers.<0..2>.weight`` and ``.bias``, the last ``[1, ...]``, and ``alpha``, one number for each map but the
    coarsest, finest first.

    Attributes:
        levels: Rows and columns of each map, finest first: the candidates are one after the other, row by row.
    """

    kind: ClassVar[str] = "foreground"

    levels: tuple[tuple[Side, Side], ...] = Field(min_length=1)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Foreground`."""
        del sizes
        found = [TensorSpec("norm.weight", ("C",)), TensorSpec("norm.bias", ("C",), optional=True)]
        found += linear_specs("embed", "embedded", "C")
        found += mlp_specs("layers", ["embedded", "half", "quarter", 1])
        return found + [TensorSpec("alpha", (len(self.levels) - 1,))] * (len(self.levels) > 1)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b = cut.b
        counts = [rows * columns for rows, columns in self.levels]
        if cut.valid is not None or cut.candidates != sum(counts):
            cut.ctx.fail(
                "the tokens are not those of the maps",
                needed=" + ".join(f"{rows} x {columns}" for rows, columns in self.levels)
                + f" = {sum(counts)} tokens beside protected ones, without padding",
                help="set the parameter `levels` to the rows and columns of each map, finest first",
            )
        x = b.cast(cut.inner(cut.x), torch.float32)
        found: list[Any] = []
        for level in reversed(range(len(counts))):
            start = sum(counts[:level])
            own = b.slice(x, 1, start, start + counts[level])  # [B, n, C]
            if found:
                alpha = b.slice(self.tensor(b, "alpha"), 0, level, level + 1)
                above = self._upsampled(cut, found[0], level)
                own = b.add(own, b.mul(b.mul(own, above), alpha))
            found.insert(0, self._rated(cut, own))
        rating = b.cat(found, 1) if len(found) > 1 else found[0]
        return around(cut, b.squeeze(rating, 2))

    def _rated(self, cut: Cut, x: Any) -> Any:
        """Return the logits of one map, ``[B, n, 1]``."""
        b = cut.b
        z = activated(b, self.linear(b, self.normed(b, x, "norm", "layer", 1e-5), "embed"), "gelu")
        return self.mlp(b, half_mean(b, z, z), "layers", 3, "gelu")

    def _upsampled(self, cut: Cut, rating: Any, level: int) -> Any:
        """Bring the logits of the next coarser map to the size of this one, ``[B, n, 1]``."""
        b = cut.b
        (rows, columns), (height, width) = self.levels[level + 1], self.levels[level]
        image = b.reshape(rating, [cut.batch.size, rows, columns])
        down = b.constant("foreground_rows", _between(height, rows))
        along = b.constant("foreground_columns", _between(width, columns).T.contiguous())
        return b.reshape(b.matmul(b.matmul(down, image), along), [cut.batch.size, height * width, 1])


def _between(into: int, of: int) -> torch.Tensor:
    """Return the matrix of linear interpolation with aligned ends, fp32 ``[into, of]``."""
    matrix = torch.zeros(into, of)
    for place in range(into):
        exact = place * (of - 1) / (into - 1) if into > 1 else 0.0
        low = min(int(exact), of - 1)
        matrix[place, low] += 1 - (exact - low)
        matrix[place, min(low + 1, of - 1)] += exact - low
    return matrix
