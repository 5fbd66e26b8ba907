"""Token spaces: the types of axes.

A :class:`TokenSpace` is a set of tokens with a size. A reduction makes a *child* space with maps to its parent. Axes of
values are tagged with :class:`Factor` products: ``()`` is an axis of size one, ``(batch, heads)`` a fused axis.
Sizes are ints, or handles of a symbolic size in the graph that is being built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Axis", "Factor", "TokenSpace", "common_descendant", "is_ancestor"]

Handle = Any
"""A value of the builder in use: an ``fx.Node`` (graph) or a ``torch.Tensor`` (eager)."""

Size = Any
"""An int, or a handle of a symbolic size."""


@dataclass(eq=False)
class TokenSpace:
    """A set of tokens, or the batch.

    Attributes:
        name: For messages, for instance ``tokens/4`` after the fourth reduction.
        size: Current number of tokens: int or size handle.
        old: Number of tokens that the same axis has in the unreduced graph: int or ``SymInt``.
        parent: The space this one was made from, or None for a root.
        index: Position in the parent of each child token (of a merged token: its representative), int64 ``[B, K]``,
            or ``[K]`` where it is the same for every sample.
        assign: Child position of each parent token, int64 ``[B, N]``: for merges, where every parent token goes.
        rows: Set when the child is a fixed list of the parent's rows (demand slicing).
        weight: How many original tokens each token stands for, ``[B, K]``; None when every one stands for itself.
        valid: Which tokens are real, bool ``[B, K]``; None when all are.
        real: The same for a root space, where the model's own mask already hides the padding.
        bias: True when attention over this space must add ``log(weight)``.
        ascending: True when child order follows parent order.
        prefix: Number of leading tokens that are exactly the parent's leading tokens, in order.
        suffix: The same at the end.
        base: The stream value in the parent space at the cut, ``[B, N, C]``: what a dropped token is restored to.
        merge: Merges another stream value of the parent space in the same way; None where tokens are taken by index.
        spread: Gives a stream ``[B, K, C]`` back to the parent's tokens by shares; ``assign`` is only the largest one.
        step: Index of the policy step that made the space, for messages.
        restore: The step's ``restore``.
        notes: What pieces remember about the tokens from cut to cut, by piece.
        facts: What is told about the tokens beside them, by name: ``[B, K]``.
        tails: Sub-spaces "all but the first p tokens", by p.
        tail_of: For such a sub-space, the space and p.
        sequence: True when the tokens are an ordered part of the parent's, protected ones with a place of their own
            excepted: what runs over tokens one after the other may run over them.
        fixed: Protected tokens with a place of their own among the others: place in the parent -> place here.
        passed: int64 ``[B, K]``: how many removed tokens of the root stand before each token, where a state that runs
            over the tokens decays over them too; None where they count for nothing. Only differences matter.
        flipped: The same tokens from behind, once asked for.
        flip_of: For such a space, the one it is made from.
        around: Set when the tokens have padding around them: the tokens' own space, places before and behind.
        surrounded: Such spaces, by places before and behind.
    """

    name: str
    size: Size
    old: Any
    parent: TokenSpace | None = None
    index: Handle | None = None
    assign: Handle | None = None
    rows: tuple[int, ...] | None = None
    weight: Handle | None = None
    valid: Handle | None = None
    real: Handle | None = None
    bias: bool = False
    ascending: bool = True
    prefix: int = 0
    suffix: int = 0
    base: Handle | None = None
    merge: Any = None
    spread: Any = None
    step: int = -1
    restore: str = "none"
    is_batch: bool = False
    notes: dict[Any, Any] = field(default_factory=dict)
    facts: dict[str, Handle] = field(default_factory=dict)
    tails: dict[int, TokenSpace] = field(default_factory=dict)
    tail_of: tuple[TokenSpace, int] | None = None
    sequence: bool = True
    fixed: dict[int, int] = field(default_factory=dict)
    passed: Handle | None = None
    flipped: TokenSpace | None = None
    flip_of: TokenSpace | None = None
    around: tuple[TokenSpace, int, int] | None = None
    surrounded: dict[tuple[int, int], TokenSpace] = field(default_factory=dict)

    @property
    def root(self) -> TokenSpace:
        """The unreduced space at the top of the chain."""
        space = self
        while space.parent is not None:
            space = space.parent
        return space

    @property
    def reduced(self) -> bool:
        """True when the space is not a root."""
        return self.parent is not None

    @property
    def chain(self) -> list[TokenSpace]:
        """The spaces from the root down to this one."""
        spaces = [self]
        while spaces[-1].parent is not None:
            spaces.append(spaces[-1].parent)
        return spaces[::-1]

    @property
    def merged(self) -> bool:
        """True when tokens of this space stand for several original tokens."""
        return self.weight is not None

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True)
class Factor:
    """One factor of an axis.

    Attributes:
        space: The space the factor runs over, or None.
        old: Size of the factor in the unreduced graph: int or ``SymInt``. An untagged factor keeps this size.
        normalised: True for the key axis of attention probabilities: values sum to one over it.
    """

    space: TokenSpace | None
    old: Any
    normalised: bool = False


Axis = tuple[Factor, ...]
"""An axis is a product of factors; the empty product is an axis of size one."""


def is_ancestor(space: TokenSpace, other: TokenSpace) -> bool:
    """Return True when ``space`` is ``other`` or lies above it."""
    current: TokenSpace | None = other
    while current is not None:
        if current is space:
            return True
        current = current.parent
    return False


def common_descendant(first: TokenSpace, second: TokenSpace) -> TokenSpace | None:
    """Return the lower of two spaces of one chain, or None when they are unrelated."""
    if is_ancestor(first, second):
        return second
    if is_ancestor(second, first):
        return first
    return None
