"""The sparse attention of a layer in an encoder, in place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.attention_sites import AttentionSite
from tokcc.analysis.sites import Sites
from tokcc.analysis.walk import Walk
from tokcc.errors import AxisError
from tokcc.ir.value import Value
from tokcc.passes.reduction import attention_source
from tokcc.passes.sparse.grids.cut import GridCut
from tokcc.passes.sparse.grids.piece import GridSelector

__all__ = ["PlannedGrid"]

aten = torch.ops.aten
ops = torch.ops.tokcc


@dataclass(frozen=True)
class PlannedGrid:
    """An action at the output of an attention.

    Every patch attends to some regions and to all tokens that are no patches; those attend to everything.

    Attributes:
        step: 0-based policy step.
        name: Preset or node kind, for labels.
        where: Place in the policy.
        layer: 0-based.
        site: The attention.
        select: Chooses the regions.
        grid: Rows and columns of the patches.
        first: Tokens in front of the patches.
        last: Tokens behind them.
        scale: Factor of the logits.
        sites: The model's.
    """

    step: int
    name: str
    where: str
    layer: int
    site: AttentionSite
    select: GridSelector
    grid: tuple[int, int]
    first: int
    last: int
    scale: float
    sites: Sites

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Return what takes the place of the attended values."""
        del node
        try:
            with walk.builder.inserting(f"{self.name}@{self.layer}"):
                return self._apply(walk, value)
        except AxisError as error:
            what = f"cannot attend to regions at layer {self.layer}"
            raise error.about(what, policy=self.where) from error

    def order(self) -> torch.Tensor:
        """Return the tokens region by region, and then those that are no patches: int64 ``[N]``."""
        (rows, columns), across = self.grid, self.select.across
        patches = torch.arange(rows * columns).reshape(across, rows // across, across, columns // across)
        behind = self.first + rows * columns
        others = [torch.arange(self.first), torch.arange(behind, behind + self.last)]
        return torch.cat([patches.permute(0, 2, 1, 3).flatten() + self.first, *others])

    def _apply(self, walk: Walk, value: Value) -> Value:
        b = walk.builder
        self._refuse_readers(walk)
        assert walk.tokens is not None
        assert walk.batch is not None
        view = attention_source(walk, self.sites, walk.tokens, self.layer)()
        if b.shape(view.value)[1] != b.shape(view.query)[1]:
            walk.ctx.fail("several heads share keys", help="choose other layers")
        order = self.order()
        index, back = b.constant("grid_order", order), b.constant("grid_order_back", torch.argsort(order))
        query, key, values = (
            b.call(aten.index_select.default, x, 2, index) for x in (view.query, view.key, view.value)
        )
        regions = self.select.across**2
        cut = GridCut(
            b=b,
            layer=self.layer,
            batch=walk.batch.size,
            query=query,
            key=key,
            value=values,
            regions=regions,
            inside=self.grid[0] * self.grid[1] // regions,
            others=self.first + self.last,
            scale=self.scale,
        )
        made = b.call(aten.index_select.default, self._attended(cut), 2, back)
        made = b.cast(made, b.dtype(value.handle))
        if value.rank != 4:
            made = b.reshape(made, [b.size(value.handle, axis) for axis in range(value.rank)])
        return value.having(handle=made)

    def _attended(self, cut: GridCut) -> Any:
        """Return what all tokens attend to, in the order of the cut: ``[B, H, N, Dv]``."""
        b = cut.b
        chosen, others = self.select.select(cut), cut.other_blocks
        index, count = chosen.index, chosen.count
        if others:
            sizes = [cut.batch, int(b.shape(index)[1]), cut.regions, len(others)]
            # In front: behind a list that is shorter than it has room for nothing is read.
            index = b.cat([b.expand(b.constant("grid_others", torch.tensor([[[others]]])), sizes), index], 3)
            count = b.add(count, len(others))
        patches = b.call(
            ops.block_sparse_attention.default,
            b.slice(cut.query, 2, 0, cut.patches),
            cut.key,
            cut.value,
            index,
            count,
            cut.inside,
            cut.inside,
            False,
            cut.scale,
        )
        if not cut.others:
            return patches
        asking = b.slice(cut.query, 2, cut.patches)
        dense = b.call(
            aten.scaled_dot_product_attention.default, asking, cut.key, cut.value, None, 0.0, False, scale=cut.scale
        )
        return b.cat([patches, dense], 2)

    def _refuse_readers(self, walk: Walk) -> None:
        """Refuse a model that gives the map away which is not computed any more."""
        if self.site.probs is None:
            return
        readers = [user.name for user in walk.nodes[self.site.probs].users if user.name != self.site.output]
        if readers:
            walk.ctx.fail(
                f"{readers[0]} reads the whole attention map", help="export the model without attention maps as outputs"
            )
