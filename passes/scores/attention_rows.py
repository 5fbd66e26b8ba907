"""Attention that chosen query rows pay to each token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tokcc.kernels import attention_probs
from tokcc.passes.cut import AttentionView, Cut
from tokcc.passes.piece import Score

__all__ = ["AttentionRows", "query_rows"]

_ = attention_probs


def query_rows(cut: Cut, view: AttentionView, start: Any, stop: Any) -> Any:
    """Return probabilities ``[B, H, R, N]`` of some query rows, beside an unchanged fused attention."""
    import torch

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


class AttentionRows(Score):
    """Probabilities of some query rows, reduced over rows and heads (EViT, arXiv:2202.07800, eq. 3; FasterVLM).

    Attributes:
        rows: ``cls`` = row 0, ``last`` = the last row, or explicit rows (contiguous).
        heads: How heads are combined.
        from_layers: Layers to combine instead of the cut's own; negative ones count from it (0 = own, -1 = before).
        combine: How layers are combined.
    """

    kind: ClassVar[str] = "attention_rows"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    rows: Literal["cls", "last"] | tuple[int, ...] = "cls"
    heads: Literal["mean", "sum", "max"] = "mean"
    from_layers: tuple[int, ...] | None = None
    since: int | None = None
    combine: Literal["sum", "mean"] = "sum"

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return the layers whose rows are read."""
        if self.since is not None:
            first = self.since if self.since >= 0 else num_layers + self.since
            return tuple(range(min(first, layer), layer + 1))
        if self.from_layers is None:
            return (layer,)
        return tuple(layer + i if i <= 0 else i for i in self.from_layers)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; probabilities are not renormalised after the protected columns are left out."""
        b = cut.b
        total: Any = None
        chosen = self.layers(cut.layer, cut.num_layers)
        for layer in chosen:
            view = cut.attention(layer)
            start, stop = self._span(cut)
            probs = query_rows(cut, view, start, stop)  # [B, H, R, N]
            one_row = isinstance(b.shape(probs)[2], int) and b.shape(probs)[2] == 1
            row = b.squeeze(probs, 2) if one_row else b.mean(probs, 2)  # [B, H, N]
            score = {"mean": b.mean, "sum": b.sum, "max": b.amax}[self.heads](row, 1)  # [B, N]
            total = score if total is None else b.add(total, score)
        return b.div(total, float(len(chosen))) if self.combine == "mean" and len(chosen) > 1 else total

    def _span(self, cut: Cut) -> tuple[Any, Any]:
        if self.rows == "cls":
            return 0, 1
        if self.rows == "last":
            return cut.b.sub_sizes(cut.tokens, 1), None
        return min(self.rows), max(self.rows) + 1
