"""Blocks by a trained gate of single queries, which all heads of a group share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.pooling import Pool
from tokcc.passes.sparse.cut import HIDDEN, SparseCut
from tokcc.passes.sparse.gating import by_head, pooled
from tokcc.passes.sparse.piece import SparseScore
from tokcc.passes.sparse.turning import turned_back
from tokcc.passes.trained import TensorSpec, Trained

__all__ = ["GroupGate"]

aten = torch.ops.aten
_GATE = "key_gate"


class GroupGate(Trained, SparseScore):
    """A gate for single tokens (SeerAttention-R, arXiv:2506.08889): one vector for the queries of a key head.

    The queries of a group go through one linear layer together; of the keys of a block the largest, smallest and mean
    value of every channel stand beside each other and go through a linear layer of their key head. Both read what was
    there before positions turned it, may be normalised, and are turned by the model's own rotation: the query to its
    position, a block to that of its first token. The rating is the softmax of their products over all blocks.

    What is remembered is a vector of each block whose slots are all filled, ``[B, Hkv, blocks, D]``; of the newest one,
    as long as it is not, zeros, so that it takes part in the softmax with the weight that the published code gives it.

    Attributes:
        pools: How keys are summed up, in the order of the weights' input.
    """

    kind: ClassVar[str] = "group_gate"
    for_single: ClassVar[bool] = True
    unturned: ClassVar[bool] = True

    pools: tuple[Pool, ...] = ("max", "min", "mean")

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Trained`."""
        group, wide = sizes["query_heads"] // sizes["heads"], len(self.pools) * sizes["head_width"]
        made = []
        for layer in range(sizes["layers"]):
            made += [
                TensorSpec(f"layers.{layer}.query.weight", ("heads", group, "head_width", "head_width")),
                TensorSpec(f"layers.{layer}.key.weight", ("heads", wide, "head_width")),
                TensorSpec(f"layers.{layer}.query_norm.weight", ("head_width",), optional=True),
                TensorSpec(f"layers.{layer}.key_norm.weight", ("head_width",), optional=True),
            ]
        return made

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        return (PageState(_GATE, kv_heads, width, block, dtype),)

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        turn = pages.turns
        flat = b.call(aten.flatten.using_ints, pages.slot, 0, 1)
        places = b.call(aten.index_select.default, pages.places, 1, flat)  # [B, R * every]
        key = turned_back(b, turn, b.call(aten.flatten.using_ints, pages.key, 2, 3), places)
        key = b.reshape(key, [b.size(pages.key, axis) for axis in range(5)])
        made = by_head(b, pooled(b, key, pages.real, self.pools), self.tensor(b, f"layers.{layer}.key.weight"))
        start = b.call(aten.index_select.default, pages.places, 1, b.call(aten.select.int, pages.slot, 1, 0))
        made = turn(self._normalised(b, made, f"layers.{layer}.key_norm"), start)
        full = b.unsqueeze(b.unsqueeze(b.unsqueeze(pages.full, 0), 0), 3)
        return {_GATE: b.where(full, made, 0.0)}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        assert cut.turns is not None
        width, group = int(b.shape(cut.unturned)[3]), cut.heads // cut.kv_heads
        side = b.reshape(cut.unturned, [b.size(cut.unturned, 0), cut.kv_heads, 1, group * width])
        weight = b.reshape(self.tensor(b, f"layers.{cut.layer}.query.weight"), [cut.kv_heads, group * width, width])
        query = self._normalised(b, by_head(b, side, weight), f"layers.{cut.layer}.query_norm")
        own = b.unsqueeze(b.call(aten.select.int, cut.places, 1, -1), 1)  # [B, 1]
        query = cut.turns[1](query, own)
        logits = cut.of_blocks(b.matmul(query, b.transpose(cut.states[_GATE], 2, 3)))  # [B, Hkv, 1, M]
        logits = b.mul(b.cast(logits, torch.float32), width**-0.5)
        return b.softmax(b.where(cut.visible, logits, HIDDEN), 3)

    def _normalised(self, b: Builder, x: Any, name: str) -> Any:
        return self.normed(b, x, name, "rms") if self.has(f"{name}.weight") else x
