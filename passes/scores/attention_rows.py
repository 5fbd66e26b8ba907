"""Attention that chosen query rows pay to each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from tokcc.ir.builder import Builder
from tokcc.passes.cut import AttentionView, Cut
from tokcc.passes.depth import LayerChoice, chosen_layer, read_layer
from tokcc.passes.features import side_by_side
from tokcc.passes.piece import Score

__all__ = ["AttentionRows", "query_rows"]


def query_rows(cut: Cut, view: AttentionView, start: Any, stop: Any) -> Any:
    """Return probabilities ``[B, H, R, N]`` of some query rows, beside an unchanged fused attention."""
    b = cut.b
    if view.probs is not None:
        return b.slice(view.probs, 2, start, stop)
    mask = view.mask
    if mask is not None:
        rows = b.shape(mask)[2]
        if not (isinstance(rows, int) and rows == 1):
            mask = b.slice(mask, 2, start, stop)
    query = b.slice(view.query, 2, start, stop)
    return b.call(torch.ops.tokcc.attention_probs.default, query, view.key, mask, view.scale)


def _joint(cut: Cut, view: AttentionView) -> AttentionView:
    """One head over the whole width."""
    b = cut.b
    heads = b.shape(view.query)[1]
    mask = view.mask
    if mask is not None and b.shape(mask)[1] != 1:
        cut.ctx.fail("heads with masks of their own cannot be read as one", help="use `heads: mean`")

    def whole(x: Any) -> Any:
        return b.unsqueeze(side_by_side(b, x), 1)  # [B, 1, N, C]

    return AttentionView(whole(view.query), whole(view.key), whole(view.value), mask, view.scale / heads**0.5)


_OVER_HEADS: dict[str, Callable[[Builder, Any], Any]] = {
    "mean": lambda b, row: b.mean(row, 1),
    "sum": lambda b, row: b.sum(row, 1),
    "max": lambda b, row: b.amax(row, 1),
    "joint": lambda b, row: b.squeeze(row, 1),
}


class AttentionRows(Score):
    """Probabilities of some query rows, reduced over rows and heads (EViT, arXiv:2202.07800, eq. 3; FasterVLM).

    Attributes:
        rows: ``cls`` = row 0, ``last`` = the last row, or explicit neighbouring rows, whose mean counts.
        heads: How heads are combined; ``joint`` = one softmax over the whole width, ``q k^T / sqrt(C)``, as
            LLaVA-PruMerge (arXiv:2403.15388) does: the model's own scale of ``1 / sqrt(d)`` is divided by ``sqrt(H)``.
        from_layers: Layers to combine instead of the cut's own, counted from it: 0 = own, -1 = the one before.
        since: Instead of that: all layers from this one up to the cut's own; negative counts from the model's end. A
            model with fewer layers gives all it has.
        layer: Instead of those: one layer, from 0, from the end, or a fraction of the depth.
        combine: How layers are combined.
    """

    kind: ClassVar[str] = "attention_rows"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    rows: Literal["cls", "last"] | tuple[int, ...] = "cls"
    heads: Literal["mean", "sum", "max", "joint"] = "mean"
    from_layers: tuple[Annotated[int, Field(le=0)], ...] | None = Field(default=None, min_length=1)
    since: int | None = None
    layer: LayerChoice = None
    combine: Literal["sum", "mean"] = "sum"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.rows, tuple):
            first = self.rows[0] if self.rows else -1
            if first < 0 or self.rows != tuple(range(first, first + len(self.rows))):
                raise ValueError("rows are given in ascending order, without gaps, from 0")
        if sum(choice is not None for choice in (self.from_layers, self.since, self.layer)) > 1:
            raise ValueError("`from_layers`, `since` and `layer` all choose the layers")
        return self

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return the layers whose rows are read."""
        if self.layer is not None:
            return (chosen_layer(self.layer, layer, num_layers),)
        if self.since is not None:
            first = self.since if self.since >= 0 else num_layers + self.since
            return tuple(range(min(max(first, 0), layer), layer + 1))
        return tuple(layer + back for back in self.from_layers or (0,))

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; probabilities are not renormalised after the protected columns are left out."""
        b = cut.b
        total: Any = None
        read_layer(self.layer, cut)  # refuses what is not there
        chosen = self.layers(cut.layer, cut.num_layers)
        if min(chosen) < 0:
            cut.ctx.fail(
                f"the score reads the attention of {-min(self.from_layers or (0,))} layers before layer {cut.layer}",
                help="choose later layers, or a smaller `from_layers`",
            )
        start, stop = self._span(cut)
        for layer in chosen:
            view = cut.attention(layer)
            probs = query_rows(cut, _joint(cut, view) if self.heads == "joint" else view, start, stop)  # [B, H, R, N]
            one_row = isinstance(b.shape(probs)[2], int) and b.shape(probs)[2] == 1
            row = b.squeeze(probs, 2) if one_row else b.mean(probs, 2)  # [B, H, N]
            score = _OVER_HEADS[self.heads](b, row)  # [B, N]
            total = score if total is None else b.add(total, score)
        return b.div(total, float(len(chosen))) if self.combine == "mean" and len(chosen) > 1 else total

    def _span(self, cut: Cut) -> tuple[Any, Any]:
        if self.rows == "cls":
            return 0, 1
        if self.rows == "last":
            if cut.valid is not None:
                cut.ctx.fail("the last row of a padded sample is padding", help="score from other rows")
            return cut.b.sub_sizes(cut.tokens, 1), None
        return self.rows[0], self.rows[-1] + 1
