"""Make every token a weighted sum of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tokcc.analysis.context import Context
from tokcc.ir.builder import Builder
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.cut import Assigned, Cut
from tokcc.passes.piece import Reducer

__all__ = ["SoftAssign"]

aten = torch.ops.aten


class SoftAssign(Reducer):
    """``x' = W x`` for a dense assignment W; protected tokens stay as they are.

    A token of the input spreads its size over the outputs in proportion to its column of W, so sizes still add up to
    the number of tokens: ``s' = (W / column sums) s``. Where tokens are given back, each gets the mean of the outputs
    by the same shares.

    Attributes:
        track_size: Count how many tokens each output stands for: means over tokens weigh by it.
        size_in_attention: Also add ``log(size)`` to the logits of its key.
    """

    kind: ClassVar[str] = "soft_assign"
    takes: ClassVar[tuple[type, ...]] = (Assigned,)

    track_size: bool = False
    size_in_attention: bool = False

    def reduce(self, cut: Cut, chosen: Assigned, child: TokenSpace) -> Any:
        """See :class:`SoftAssign`."""
        b = cut.b
        matrix = chosen.matrix
        if chosen.valid is not None:
            matrix = b.mul(matrix, b.unsqueeze(b.cast(chosen.valid, torch.float32), 2))  # empty slots hold nothing
        mix = _Mix(matrix, cut.first, cut.last, cut.tokens, chosen.size)
        child.size, child.ascending = chosen.size, chosen.ascending
        child.index = cut.with_protected(chosen.index)
        child.valid = _around(cut, chosen.valid)
        child.assign = _hard(cut, mix)
        child.spread = mix.spread
        child.merge = _stream_merge(mix, child)
        if self.track_size or self.size_in_attention:
            child.weight, child.bias = mix.sizes(cut), self.size_in_attention
        return mix.apply(b, cut.x)


@dataclass(frozen=True)
class _Mix:
    """W with the protected tokens around it.

    Attributes:
        matrix: fp32 ``[B, K, M]`` over the candidates; rows of empty slots are zero.
        first: Protected leading tokens.
        last: Protected trailing tokens.
        tokens: N.
        size: K and the protected tokens.
    """

    matrix: Any
    first: int
    last: int
    tokens: Any
    size: Any

    def apply(self, b: Builder, x: Any, matrix: Any = None) -> Any:
        """Reduce ``[B, N, C]`` to ``[B, first + K + last, C]``."""
        weights = b.cast(self.matrix if matrix is None else matrix, b.dtype(x))
        return self._kept_around(b, x, self.tokens, lambda inner: b.matmul(weights, inner))

    def spread(self, ctx: Context, x: Any, without: int) -> Any:
        """Give ``[B, K, C]`` back to all tokens; ``without`` leading protected ones are in neither."""
        b = ctx.builder
        back = b.cast(b.transpose(self.shares(b), 1, 2), b.dtype(x))  # [B, M, K]
        size = b.sub_sizes(self.size, without)
        return self._kept_around(b, x, size, lambda inner: b.matmul(back, inner), without)

    def shares(self, b: Builder) -> Any:
        """W with columns that sum to one, ``[B, K, M]``."""
        return b.div(self.matrix, b.clamp_min(b.sum(self.matrix, 1, keepdim=True), 1e-30))

    def sizes(self, cut: Cut) -> Any:
        """Return how many original tokens each output stands for, ``[B, first + K + last]`` in the stream's dtype."""
        b = cut.b
        weight = cut.space.weight
        own = b.cast(cut.present() if weight is None else weight, torch.float32)
        return b.cast(b.squeeze(self.apply(b, b.unsqueeze(own, 2), self.shares(b)), 2), b.dtype(cut.x))

    def _kept_around(self, b: Builder, x: Any, size: Any, changed: Any, without: int = 0) -> Any:
        first = self.first - without
        stop = b.sub_sizes(size, self.last) if self.last else None
        parts = [changed(b.slice(x, 1, first, stop))]
        if first:
            parts.insert(0, b.slice(x, 1, 0, first))
        if self.last:
            parts.append(b.slice(x, 1, stop, None))
        return b.cat(parts, 1)


def _around(cut: Cut, valid: Any) -> Any:
    """Put the protected tokens around the validity of the outputs."""
    if valid is None:
        return None
    if cut.last:
        cut.ctx.fail(
            "samples keep different numbers of tokens, so the last ones cannot be protected by their place",
            help="leave `protect.last` out, or use a model without a padding mask",
        )
    b = cut.b
    return b.cat([b.full([cut.batch.size, cut.first], True, torch.bool, cut.x), valid], 1) if cut.first else valid


def _hard(cut: Cut, mix: _Mix) -> Any:
    """Return a function that says which output each token weighs most in, ``[B, N]``."""
    made: list[Any] = []

    def assign(ctx: Context) -> Any:
        if not made:
            b = ctx.builder
            parts = [b.add(b.argmax(mix.matrix, 1), mix.first) if mix.first else b.argmax(mix.matrix, 1)]
            if mix.first:
                parts.insert(0, cut.per_sample(b.arange(mix.first, cut.x)))
            if mix.last:
                tail = b.add(b.arange(mix.last, cut.x), b.sub_sizes(mix.size, mix.last))
                parts.append(cut.per_sample(tail))
            made.append(b.cat(parts, 1))
        return made[0]

    return assign


def _stream_merge(mix: _Mix, child: TokenSpace) -> Any:
    """Return a function that mixes another stream value of the parent space in the same way."""

    def merge(ctx: Context, value: Value, axis: int) -> Value:
        reduced = ctx.as_rows(value, axis, lambda x: mix.apply(ctx.builder, x))
        axes = list(value.axes)
        axes[axis] = (Factor(child, child.root.old),)
        return value.having(handle=reduced, axes=tuple(axes))

    return merge
