"""What score, selector and reducer pieces work with: one cut of one layer, in canonical layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

import tokcc.kernels  # registers the operations that pieces call
from tokcc.analysis.context import Context
from tokcc.ir.builder import Builder
from tokcc.ir.space import TokenSpace
from tokcc.passes.budget import Count

__all__ = ["Assigned", "AttentionView", "Chosen", "Cut", "Gridded", "Grouped", "Kept", "Matched", "Tiered"]

aten = torch.ops.aten
assert tokcc.kernels is not None
T = TypeVar("T")


def _unknown() -> Any:
    raise NotImplementedError("the attended values of this attention were not asked for")


@dataclass(frozen=True)
class AttentionView:
    """An attention over the current tokens, in canonical layout.

    Attributes:
        query: ``[B, H, N, D]``.
        key: ``[B, H, N, D]`` (heads of grouped queries repeated).
        value: ``[B, H, N, D]``.
        mask: Broadcastable to ``[B, H, N, N]``, bool or additive, with the size bias of merged keys; or None.
        scale: Factor of the logits.
        probs: ``[B, H, N, N]`` when the model writes its attention out, else None.
        attended: Returns the attended values of each head, before the output projection: ``[B, H, N, D]``.
    """

    query: Any
    key: Any
    value: Any
    mask: Any
    scale: float
    probs: Any = None
    attended: Callable[[], Any] = _unknown


@dataclass(frozen=True)
class Kept:
    """A selection: the tokens that stay.

    Attributes:
        index: int64 ``[B, K]``, or ``[K]`` where it is the same for every sample; protected tokens included.
        valid: bool ``[B, K]`` where slots may be empty, else None.
        ascending: The index is in the order of the sequence.
        size: K.
        score: ``[B, N]``: what the selection was made by, for reducers that weight by it; or None.
        by_input: The input decides how many slots are filled, so tokens may be dropped however many slots there are.
        middle: Place of a protected token between the others, which are in the order of the sequence; or None.
    """

    index: Any
    valid: Any
    ascending: bool
    size: Any
    score: Any = None
    by_input: bool = False
    middle: Any = None


@dataclass(frozen=True)
class Matched:
    """A matching: some tokens stay, others join them.

    Attributes:
        keep: int64 ``[B, K]``: kept tokens in output order.
        source: int64 ``[B, R]``: tokens that are merged away.
        slot: int64 ``[B, R]``: the kept token that each source joins, counted from the kept token ``first``.
        first: Kept tokens before these, which nothing joins (int or size handle).
        size: K.
        valid: bool ``[B, K]``, or None.
        weight: ``[B, N]`` weights to merge with where padding exists (0 for what must not count), or None.
        ascending: Output order follows the sequence.
        partial: Some sources join nothing: their slot is K.
    """

    keep: Any
    source: Any
    slot: Any
    first: Any
    size: Any
    valid: Any = None
    weight: Any = None
    ascending: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Grouped:
    """Neighbouring tokens in groups of one size; an incomplete last group is dropped.

    Attributes:
        width: Tokens in a group.
        size: Number of groups.
    """

    width: int
    size: Any


@dataclass(frozen=True)
class Gridded:
    """A grid of tokens that becomes a coarser one.

    Attributes:
        grid: Rows and columns of the candidates.
        cells: Rows and columns of what they become.
        size: Tokens behind the reduction, protected ones included.
    """

    grid: tuple[int, int]
    cells: tuple[int, int]
    size: Any


@dataclass(frozen=True)
class Tiered:
    """A ranking in three tiers: what stays, what is condensed, and the rest.

    Attributes:
        best: The first tier, protected tokens included.
        middle: int64 ``[B, M]``: the second tier, best first.
        rest: int64 ``[B, R]``: the others, best first.
        score: ``[B, N]``: what was ranked by.
    """

    best: Kept
    middle: Any
    rest: Any
    score: Any

    @property
    def size(self) -> Any:
        """Tokens that stay as they are."""
        return self.best.size


@dataclass(frozen=True)
class Assigned:
    """A soft assignment: every output token is a weighted sum of candidates.

    Attributes:
        matrix: fp32 ``[B, K, M]`` over the candidates; the rows sum to one.
        index: int64 ``[B, K]``: a candidate that stands for each output token in masks and position tables, counted
            from the first candidate.
        size: Tokens behind the reduction, protected ones included.
        valid: bool ``[B, K]`` where output tokens may be empty, else None.
        ascending: The index is in the order of the sequence.
    """

    matrix: Any
    index: Any
    size: Any
    valid: Any = None
    ascending: bool = False


Chosen = Kept | Matched | Grouped | Gridded | Tiered | Assigned


def _as_they_are(x: Any, places: Any) -> Any:
    del places
    return x


def _no_stream(layer: int) -> Any:
    raise NotImplementedError(f"the output of layer {layer} was not asked for")


def _no_mixer() -> Any:
    raise NotImplementedError("the output of this layer's mixer was not asked for")


@dataclass
class Cut:
    """One reduction in work.

    Attributes:
        ctx: The walk's context.
        x: The stream value in canonical layout, ``[B, N, C]``.
        space: The token space of ``x``.
        batch: The batch space.
        layer: 0-based layer of the cut.
        num_layers: Depth of the model.
        count: The budget.
        first: Protected leading tokens.
        last: Protected trailing tokens.
        seed: For random pieces.
        initial: Number of candidates in the unreduced model.
        attention: Returns the attention of a layer over the current tokens (default: the cut's own layer).
        ahead: Returns what the rest of the program makes of candidates by themselves: takes vectors ``[B, K, C]`` and
            whose places they have, ``[K]`` counted from the first candidate, and returns ``[B, K, D]``.
        stream: Returns the output of an earlier layer, of the current tokens: ``[B, N, C]``.
        stage: Which of the step's layers this is, from 0.
        stages: How many layers the step has.
        middle: Place of a protected token between the candidates, or None.
        initial_middle: Its place in the unreduced model.
        mixed: Returns what the layer's state-space mixer makes of the tokens before its projection, ``[B, N, E]``.
    """

    ctx: Context
    x: Any
    space: TokenSpace
    batch: TokenSpace
    layer: int
    num_layers: int
    count: Count
    first: int
    last: int
    seed: int
    attention: Callable[..., AttentionView]
    stage: int = 0
    stages: int = 1
    ahead: Callable[[Any, Any], Any] = _as_they_are
    stream: Callable[[int], Any] = _no_stream
    middle: int | None = None
    initial_middle: int | None = None
    mixed: Callable[[], Any] = _no_mixer

    @property
    def b(self) -> Builder:
        """The builder."""
        return self.ctx.builder

    @property
    def protected(self) -> int:
        """Number of tokens that are no candidates."""
        return self.first + self.last + (self.middle is not None)

    @property
    def tokens(self) -> Any:
        """Current number of tokens."""
        return self.space.size

    @property
    def candidates(self) -> Any:
        """Current number of tokens that may be dropped."""
        return self.b.sub_sizes(self.tokens, self.protected)

    @property
    def initial_candidates(self) -> Any:
        """Number of candidates in the unreduced model."""
        return self.b.sub_sizes(self.space.root.size, self.protected)

    @property
    def valid(self) -> Any:
        """Which tokens are real, bool ``[B, N]``, or None when all are."""
        return self.space.valid if self.space.valid is not None else self.space.real

    def present(self) -> Any:
        """Return which tokens are real, bool ``[B, N]``, also when all are."""
        if self.valid is not None:
            return self.valid
        return self.b.full([self.batch.size, self.tokens], True, torch.bool, self.x)

    def valid_count(self) -> Any:
        """Return the number of real candidates of each sample, int64 ``[B]``."""
        b = self.b
        total = b.sum(b.cast(self.present(), torch.int64), 1)
        return b.call(aten.clamp_min.default, b.sub(total, self.protected), 0)

    def initial_valid_count(self) -> Any:
        """Return the number of real candidates before any reduction, int64 ``[B]``."""
        b = self.b
        if self.space.root.real is None:  # every token was real until a reduction left slots empty
            return b.add(b.full([self.batch.size], 0, torch.int64, self.x), self.initial_candidates)
        total = b.sum(b.cast(self.space.root.real, torch.int64), 1)
        return b.call(aten.clamp_min.default, b.sub(total, self.protected), 0)

    def of_stage(self, values: Sequence[T], name: str) -> T:
        """Return this layer's entry of a parameter that has one for each of the step's layers, or one for all."""
        if len(values) not in (1, self.stages):
            self.ctx.fail(
                f"`{name}` has {len(values)} entries for the step's {self.stages} layers",
                needed="one entry, or one for each chosen layer",
                help=f"write as many entries in `{name}` as `at.layers` chooses",
            )
        return values[self.stage if len(values) > 1 else 0]

    def positions(self) -> Any:
        """Return int64 ``[N]``."""
        return self.b.arange(self.tokens, self.x)

    def per_sample(self, row: Any) -> Any:
        """Repeat ``[K]`` for every sample: ``[B, K]``."""
        b = self.b
        return b.expand(b.unsqueeze(row, 0), [self.batch.size, -1])

    def inner(self, values: Any) -> Any:
        """Return the columns of the candidates of ``[B, N, ...]`` or ``[B, N]``."""
        stop = None if self.last == 0 else self.b.sub_sizes(self.tokens, self.last)
        if self.middle is not None:
            parts = [self.b.slice(values, 1, self.first, self.middle), self.b.slice(values, 1, self.middle + 1, stop)]
            return self.b.cat(parts, 1)
        return self.b.slice(values, 1, self.first, stop)

    def with_protected_values(self, inner: Any) -> Any:
        """Put the protected tokens at both ends around new values, ``[B, K, C]`` -> ``[B, first + K + last, C]``."""
        b = self.b
        parts = [b.slice(self.x, 1, 0, self.first)] * bool(self.first) + [inner]
        if self.last:
            parts.append(b.slice(self.x, 1, b.sub_sizes(self.tokens, self.last)))
        return b.cat(parts, 1) if len(parts) > 1 else inner

    def in_front(self, kept: Any) -> Any:
        """Return how many of the kept candidates stand in front of a protected token between them."""
        return self.b.floordiv_sizes(kept, 2)

    def with_protected(self, index: Any) -> Any:
        """Put the protected tokens around chosen candidates: ``[B, K]`` relative -> ``[B, first + K + last]``.

        A protected token between the candidates gets as many of them in front of it as behind it, in the order given.
        """
        b = self.b
        parts = [b.add(index, self.first) if self.first else index]
        if self.middle is not None:
            behind = b.cast(b.compare("ge", parts[0], self.middle), torch.int64)
            index, half = b.add(parts[0], behind), self.in_front(b.size(index, 1))
            own = b.full([self.batch.size, 1], self.middle, torch.int64, self.x)
            parts = [b.slice(index, 1, 0, half), own, b.slice(index, 1, half)]
        if self.first:
            parts.insert(0, self.per_sample(b.arange(self.first, self.x)))
        if self.last:
            tail = b.add(b.arange(self.last, self.x), b.sub_sizes(self.tokens, self.last))
            parts.append(self.per_sample(tail))
        return b.cat(parts, 1)
