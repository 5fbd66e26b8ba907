"""What the rest of the program makes of tokens: each by itself, up to the output that carries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from tokcc.analysis.sites import Sites
from tokcc.analysis.walk import Walk
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value

__all__ = ["Ahead", "ahead_of"]

Ahead = Callable[[Any, Any], Any]
"""Takes vectors of tokens ``[B, K, C]`` and whose places they have, int64 ``[K]``; returns what becomes of them."""


def ahead_of(walk: Walk, sites: Sites, node: fx.Node, value: Value, first: int) -> Ahead:
    """Return what runs the program from a cut to its last output with tokens, for tokens in the cut's place.

    Args:
        walk: The walk, at the cut.
        sites: Of the program.
        node: The cut.
        value: The stream there.
        first: Leading tokens that are not among those asked for: what follows may cut them off.
    """

    def ahead(x: Any, places: Any) -> Any:
        b = walk.builder
        outputs = [
            out
            for out in walk.program.output_values
            if isinstance(out, fx.Node) and out not in walk.env and sites.has_tokens(out.name)
        ]
        if node in walk.program.output_values or not outputs:
            return x  # nothing follows
        later = [layer.index for layer in sites.layers if sites.order[layer.mixes] > sites.order[node.name]]
        if later:
            walk.ctx.fail(
                f"what becomes of a token by itself cannot be said before layer {later[0]}, where tokens attend",
                help="cut at the last layer's `block_output`, or at `encoder_output`",
            )
        (axis,) = (
            i
            for i, factors in enumerate(value.axes)
            if any(f.space is not None and not f.space.is_batch for f in factors)
        )
        (own,) = (f.space for f in value.axes[axis])
        assert own is not None
        leading = b.slice(value.handle, axis, 0, first)
        tokens = x if axis == 1 else b.transpose(x, 0, 1)
        index = b.add(places, first) if first else places
        if first:
            tokens = b.cat([leading, tokens], axis)
            index = b.cat([b.arange(first, x), index], 0)
        space = TokenSpace(
            name=f"{own.name}/ahead", size=b.size(tokens, axis), old=own.root.old, parent=own, index=index, prefix=first
        )
        space.ascending = False
        axes = list(value.axes)
        axes[axis] = (Factor(space, own.root.old),)
        made = walk.rehearse(node, value.having(handle=tokens, axes=tuple(axes), side=False), outputs[-1])
        return _tokens(walk, made, space, first)

    return ahead


def _tokens(walk: Walk, made: Any, space: TokenSpace, first: int) -> Any:
    """Bring an output to ``[B, K, D]`` without the leading tokens."""
    b = walk.builder
    for axis, factors in enumerate(made.axes if isinstance(made, Value) else ()):
        found = factors[0].space if len(factors) == 1 else None
        if made.rank != 3 or found is None or (found is not space and (found.tail_of or (None,))[0] is not space):
            continue
        gone = 0 if found.tail_of is None or found is space else found.tail_of[1]
        handle = b.slice(made.handle, axis, first - gone) if first > gone else made.handle
        return b.transpose(handle, 0, 1) if axis == 0 else handle
    walk.ctx.fail("the output does not hold one vector for each token", help="measure on `features`")
