"""Token spaces as sequences: read from behind, with padding around them, and what may run over them in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tokcc.ir.space import TokenSpace

if TYPE_CHECKING:
    from tokcc.analysis.context import Context

__all__ = ["check_sequence", "flipped", "flipped_index", "gaps", "surrounded"]

aten = torch.ops.aten


def check_sequence(ctx: Context, space: TokenSpace, what: str) -> None:
    """Refuse tokens that are no ordered part of the model's own.

    Args:
        ctx: The context.
        space: The tokens.
        what: Runs over them, for the message.
    """
    own = space.around[0] if space.around is not None else space
    for step in (own.flip_of or own).chain[1:]:
        if step.rows is not None:
            ctx.fail(f"{what} runs over the token axis in order, and only some rows of it were computed")
        if step.weight is not None:
            ctx.fail(
                f"{what} runs over the token axis in order, and merged tokens have no one place in it",
                help="drop tokens instead (`reduce: {kind: drop}`)",
            )
        if not step.sequence:
            ctx.fail(
                f"{what} runs over the token axis in order, and the tokens were put in another one",
                help="keep the order (`select: {kind: topk, order: sequence}`, `reduce: {kind: drop}`)",
            )


def _from_behind(ctx: Context, values: Any) -> Any:
    return None if values is None else ctx.builder.call(aten.flip.default, values, [1])


def flipped(ctx: Context, space: TokenSpace) -> TokenSpace:
    """Return the space of the same tokens from behind."""
    if space.flip_of is not None:
        return space.flip_of
    if space.flipped is None:
        parent = None if space.parent is None else flipped(ctx, space.parent)
        before = 0 if space.parent is None else space.parent.size
        passed = _from_behind(ctx, space.passed)
        space.flipped = TokenSpace(
            name=f"{space.name}, from behind",
            size=space.size,
            old=space.old,
            parent=parent,
            valid=_from_behind(ctx, space.valid),
            ascending=space.ascending,
            prefix=space.suffix,
            suffix=space.prefix,
            step=space.step,
            restore=space.restore,
            sequence=space.sequence,
            fixed={before - 1 - old: space.size - 1 - new for old, new in space.fixed.items()},
            passed=None if passed is None else ctx.builder.call(aten.neg.default, passed),
            flip_of=space,
        )
    return space.flipped


def flipped_index(ctx: Context, space: TokenSpace) -> Any:
    """Return the index into its parent of a space from behind."""
    b = ctx.builder
    assert space.parent is not None
    index = ctx.own_index(space)
    back = b.call(aten.flip.default, index, [len(b.shape(index)) - 1])
    return b.add(b.call(aten.neg.default, back), b.sub_sizes(space.parent.size, 1))


def surrounded(ctx: Context, space: TokenSpace, before: int, behind: int) -> TokenSpace:
    """Return the space of tokens with padding around them."""
    if not before and not behind:
        return space
    key = (before, behind)
    if key not in space.surrounded:
        parent = None if space.parent is None else surrounded(ctx, space.parent, before, behind)
        space.surrounded[key] = TokenSpace(
            name=f"{space.name} and padding",
            size=ctx.builder.add_sizes(space.size, before + behind),
            old=space.old + before + behind,
            parent=parent,
            ascending=space.ascending,
            step=space.step,
            restore=space.restore,
            sequence=space.sequence,
            around=(space, before, behind),
        )
    return space.surrounded[key]


def gaps(ctx: Context, space: TokenSpace) -> Any:
    """Return how many removed tokens stand between each token and the one before it, int64 ``[B, K]``, or None."""
    if space.passed is None:
        return None
    b = ctx.builder
    first = b.slice(space.passed, 1, 0, 1)
    return b.sub(space.passed, b.cat([first, b.slice(space.passed, 1, 0, b.sub_sizes(space.size, 1))], 1))
