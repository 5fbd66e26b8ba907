"""Merge matched tokens after trained gates have changed the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Matched
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.weighted_mean import WeightedMean
from tokcc.passes.taking import take
from tokcc.passes.trained import TensorSpec, Trained

__all__ = ["GatedMean"]

aten = torch.ops.aten


class GatedMean(Trained, Reducer):
    """Re-activation of the tokens about to be merged (PYRA, arXiv:2403.09192, eq. 7 to 10), then their weighted mean.

    For the pairs in order of similarity, ``u`` the source and ``w`` the destination, each times its size:
    ``z = LN(u + w)``, channel gate ``c = 2 sigmoid(channel^T z)``, token gate ``t = 2 sigmoid(z token) - 1``, and the
    source becomes ``u + (u * c) * t``.

    Tensors of the i-th chosen layer, from 0: ``stages.<i>.channel`` ``[r]`` for its r pairs, ``stages.<i>.token``
    ``[C]``, ``stages.<i>.norm.weight`` and ``.bias``.

    Attributes:
        size_in_attention: As of `weighted_mean`.
    """

    kind: ClassVar[str] = "gated_mean"
    takes: ClassVar[tuple[type, ...]] = (Matched,)

    size_in_attention: bool = True

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`GatedMean`."""
        return [
            spec
            for i in range(sizes["stages"])
            for spec in (
                TensorSpec(f"stages.{i}.channel", (f"r_{i}",)),
                TensorSpec(f"stages.{i}.token", ("C",)),
                TensorSpec(f"stages.{i}.norm.weight", ("C",)),
                TensorSpec(f"stages.{i}.norm.bias", ("C",), optional=True),
            )
        ]

    def reduce(self, cut: Cut, chosen: Matched, child: TokenSpace) -> Any:
        """See :class:`GatedMean`."""
        if chosen.weight is not None:
            cut.ctx.fail(
                "the trained gates are for a fixed number of pairs, and samples differ in theirs",
                help="use a model without a padding mask, and a selector without a threshold",
            )
        changed = replace(cut, x=self._gated(cut, chosen))
        return WeightedMean(size_in_attention=self.size_in_attention).reduce(changed, chosen, child)

    def _gated(self, cut: Cut, chosen: Matched) -> Any:
        """Return the stream with its sources changed."""
        b = cut.b
        stage = f"stages.{cut.stage}"
        pairs, trained = b.size(chosen.source, 1), int(self.weight(f"{stage}.channel").shape[0])
        if pairs != trained:
            cut.ctx.fail(
                f"the weights are for {trained} pairs here, and "
                + (f"{pairs} merge" if isinstance(pairs, int) else "their number depends on the length"),
                help="give the budget that the weights were trained with",
            )
        target = b.gather(chosen.keep, 1, b.add(chosen.slot, chosen.first))  # [B, R]
        source = b.cast(take(cut, cut.x, chosen.source), torch.float32)  # [B, R, C]
        both = b.add(self._sized(cut, source, chosen.source), self._sized(cut, self._taken(cut, target), target))
        z = self.normed(b, both, f"{stage}.norm", "layer", 1e-5)
        channel = b.matmul(b.unsqueeze(self.tensor(b, f"{stage}.channel"), 0), z)  # [B, 1, C]
        token = b.matmul(z, b.unsqueeze(self.tensor(b, f"{stage}.token"), 1))  # [B, R, 1]
        channel = b.mul(b.call(aten.sigmoid.default, channel), 2.0)
        token = b.sub(b.mul(b.call(aten.sigmoid.default, token), 2.0), 1.0)
        # The gates do not depend on whether the source is already multiplied by its size.
        changed = b.add(source, b.mul(b.mul(source, channel), token))
        return b.call(torch.ops.tokcc.scatter_tokens.default, cut.x, chosen.source, b.cast(changed, b.dtype(cut.x)))

    def _taken(self, cut: Cut, index: Any) -> Any:
        return cut.b.cast(take(cut, cut.x, index), torch.float32)

    def _sized(self, cut: Cut, tokens: Any, index: Any) -> Any:
        b = cut.b
        if cut.space.weight is None:
            return tokens
        return b.mul(tokens, b.unsqueeze(b.cast(take(cut, cut.space.weight, index), torch.float32), 2))
