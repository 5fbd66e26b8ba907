"""Blocks by a trained gate that sees queries and keys before they are turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokcc.passes.cache.pooling import Pool
from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.gating import by_head, pooled
from tokcc.passes.sparse.piece import SparseScore
from tokcc.passes.trained import TensorSpec, Trained

__all__ = ["Gate"]

aten = torch.ops.aten


class Gate(Trained, SparseScore):
    """A gate for each layer, trained to tell the mass of blocks (SeerAttention, arXiv:2410.13276).

    The queries of a row are averaged; of the keys of a block the largest, smallest and mean value of every channel
    stand beside each other. Both go through a linear layer of their own for every head, are turned to the position of
    the row's or block's first token by the model's own rotation, and multiplied. The rating is the softmax over the
    blocks that the row sees.

    Attributes:
        pools: How keys are summed up, in the order of the weights' input.
    """

    kind: ClassVar[str] = "gate"
    unturned: ClassVar[bool] = True

    pools: tuple[Pool, ...] = ("max", "min", "mean")

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Trained`."""
        wide = len(self.pools) * sizes["head_width"]
        return [
            spec
            for layer in range(sizes["layers"])
            for spec in (
                TensorSpec(f"layers.{layer}.query.weight", ("query_heads", "head_width", "head_width")),
                TensorSpec(f"layers.{layer}.key.weight", ("heads", wide, "head_width")),
            )
        ]

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        assert cut.turns is not None
        asked = b.unsqueeze(b.unsqueeze(b.clamp_min(cut.query_counts, 1.0), 1), 3)  # [B, 1, MQ, 1]
        mean = b.div(b.sum(cut.in_rows(cut.unturned), 3), b.cast(asked, b.dtype(cut.query)))
        query = cut.turns[0](self._each_head(cut, "query", mean), self._places(cut, cut.first_slots))
        keys = pooled(b, cut.by_key(cut.unturned_key, 2), cut.by_key(cut.real, 1), self.pools)  # [B, Hkv, M, 3 * D]
        start = b.squeeze(cut.block_starts, 0)
        key = cut.turns[1](self._each_head(cut, "key", keys), self._places(cut, start))
        logits = b.mul(cut.products(query, key), int(b.shape(query)[3]) ** -0.5)
        return b.softmax(b.where(cut.visible, logits, HIDDEN), 3)

    def _each_head(self, cut: SparseCut, name: str, x: Any) -> Any:
        return by_head(cut.b, x, self.tensor(cut.b, f"layers.{cut.layer}.{name}.weight"))

    def _places(self, cut: SparseCut, slots: Any) -> Any:
        return cut.b.call(aten.index_select.default, cut.places, 1, slots)
