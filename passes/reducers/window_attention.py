"""A token for each window of a grid, which a text has a say in and which attends to its window only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.space import TokenSpace
from tokcc.passes.blocks import Blocks
from tokcc.passes.cells import cells_of
from tokcc.passes.cut import Cut, Gridded
from tokcc.passes.depth import LayerChoice, read_layer
from tokcc.passes.grid import windows
from tokcc.passes.piece import Reducer
from tokcc.passes.texts import TextVector
from tokcc.passes.trained import TensorSpec, linear_specs, mlp_specs

__all__ = ["WindowAttention"]


class WindowAttention(TextVector, Blocks, Reducer):
    """Query-conditioned convolutional compression (QueCC, arXiv:2411.03312, section 4).

    With the tokens x of a grid, the tokens m of several layers side by side and a vector t of the text:
    ``x' = x + LN(W t)``; ``q = conv(mlp(x'))``, depth-wise, kernel and stride as large as a window; ``k = mlp(m)`` and
    ``v = mlp(m)``, where mlp is linear, GELU, linear, layer norm. Each q attends to the k and v of its own window.

    Tensors: ``text.weight`` ``[C, T]``, ``text_norm.weight``; ``query.0.weight`` ``[hidden, C]``, ``query.1.weight``
    ``[C, hidden]``, ``query_norm.weight``; the same of ``key`` and ``value``, from the width of m; ``conv.weight``
    ``[C, 1, height, width]``; ``attn.{q,k,v,o}_proj.weight``; and biases where there are any.

    Attributes:
        levels: Layers whose outputs are m; None = x itself. They count like a score's ``layer``.
        heads: Heads of the attention.
    """

    kind: ClassVar[str] = "window_attention"
    takes: ClassVar[tuple[type, ...]] = (Gridded,)
    always: ClassVar[bool] = True

    levels: tuple[LayerChoice, ...] | None = Field(default=None, min_length=1)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`WindowAttention`."""
        wide: int | str = "C" if self.levels is None else "E"
        if self.levels is not None and "C" in sizes:
            wide = sizes["C"] * len(self.levels)
        found = [*linear_specs("text", "C", "T"), *_norm("text_norm")]
        for name, width in (("query", "C"), ("key", wide), ("value", wide)):
            found += [*mlp_specs(name, [width, f"{name}_hidden", "C"]), *_norm(f"{name}_norm")]
        found += [TensorSpec("conv.weight", ("C", 1, "window_height", "window_width"))]
        found += [TensorSpec("conv.bias", ("C",), optional=True)]
        return [*found, *self.projection_specs("attn", "qkvo", "C")]

    def reduce(self, cut: Cut, chosen: Gridded, child: TokenSpace) -> Any:
        """See :class:`WindowAttention`."""
        b = cut.b
        tall, wide = self._window(cut, chosen)
        cells_of(cut, chosen, child)
        x = b.cast(cut.inner(cut.x), torch.float32)
        text = self.read_vector(cut, self.weight("text.weight").shape[1])  # [B, T]
        said = self.normed(b, self.linear(b, text, "text"), "text_norm", "layer", 1e-5)
        query = self._encoded(cut, b.add(x, b.unsqueeze(said, 1)), "query")
        levels = x if self.levels is None else self._levels(cut, self.levels)
        key, value = self._encoded(cut, levels, "key"), self._encoded(cut, levels, "value")
        query, key, value = (windows(cut, part, chosen.grid, chosen.cells) for part in (query, key, value))
        rows, channels = chosen.cells[0] * chosen.cells[1], b.shape(x)[2]
        # A depth-wise convolution whose stride is its kernel is a weighted sum over each window.
        kernel = self.weight("conv.weight").reshape(channels, tall * wide).T.contiguous()
        query = b.sum(b.mul(query, b.constant("window_attention_kernel", kernel)), 2)  # [B, n m, C]
        if self.has("conv.bias"):
            query = b.add(query, self.tensor(b, "conv.bias"))
        every = b.mul_sizes(cut.batch.size, rows)
        query = b.reshape(query, [every, 1, channels])
        key, value = (b.reshape(part, [every, tall * wide, channels]) for part in (key, value))
        made = self.attend(b, query, key, "attn", None, cut.x, value)  # [B n m, 1, C]
        made = b.reshape(made, [cut.batch.size, rows, channels])
        return cut.with_protected_values(b.cast(made, b.dtype(cut.x)))

    def _window(self, cut: Cut, chosen: Gridded) -> tuple[int, int]:
        (height, width), (rows, columns) = chosen.grid, chosen.cells
        if height % rows or width % columns:
            cut.ctx.fail(
                f"a grid of {height} x {width} tokens does not divide into {rows} x {columns} windows of one size",
                needed="as many new rows and columns as divide those of the grid",
                help="change the budget",
            )
        own = (height // rows, width // columns)
        trained = tuple(self.weight("conv.weight").shape[2:])
        if trained != own:
            cut.ctx.fail(
                f"the weights are for windows of {trained[0]} x {trained[1]} tokens, and the budget makes windows of "
                f"{own[0]} x {own[1]}",
                help="give the budget that the weights were trained with",
            )
        return own

    def _encoded(self, cut: Cut, x: Any, name: str) -> Any:
        return self.normed(cut.b, self.mlp(cut.b, x, name, 2, "gelu"), f"{name}_norm", "layer", 1e-5)

    def _levels(self, cut: Cut, levels: tuple[LayerChoice, ...]) -> Any:
        b = cut.b
        parts = [cut.inner(cut.stream(read_layer(level, cut))) for level in levels]
        return b.cast(b.cat(parts, 2), torch.float32)


def _norm(name: str) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(f"{name}.weight", ("C",)), TensorSpec(f"{name}.bias", ("C",), optional=True)
