"""What the pieces of prompt steps work with: the stream of a decoder between layers, in the first call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.visible import slot_rank

__all__ = ["PREFERRED", "Branch", "PromptCut", "Remaining", "Selected"]

aten = torch.ops.aten

PREFERRED = 1e20
"""Score of a candidate that stays before all others; what is no candidate stays in any case."""


@dataclass(frozen=True)
class Selected:
    """The tokens that stay.

    Attributes:
        index: int64 ``[B, K]``, ascending.
        size: K.
        score: fp32 ``[B, N]``: what they were chosen by; None where selectors want none.
    """

    index: Any
    size: Any
    score: Any = None


@dataclass(frozen=True)
class Remaining:
    """The shorter stream.

    Attributes:
        x: ``[B, K, C]``.
        index: int64 ``[B, K]``: the token that each one stands for, whose position and mask it has.
        size: K.
        ascending: Whether the index is.
    """

    x: Any
    index: Any
    size: Any
    ascending: bool = True


@dataclass(frozen=True)
class Branch:
    """What an attention or an MLP reads and what it adds to the stream.

    Attributes:
        input: ``[B, N, C]``, normed.
        output: ``[B, N, C]``, before it is added.
        hidden: What the last projection of an MLP reads, ``[B, N, F]``; of an attention, the attended values.
    """

    input: Any
    output: Any
    hidden: Any


@dataclass
class PromptCut:
    """One reduction of a prompt in work.

    In a call that is not the first one nothing is dropped, and all sizes are those of the call.

    Attributes:
        b: The builder.
        x: The stream, ``[B, N, C]``.
        layer: 0-based: the cut is behind its attention, or behind it; -1 = in front of the first layer.
        num_layers: Depth of the model.
        tokens: N (int or size handle).
        kept: K.
        first_call: A size: 1 in a call without past, else 0.
        candidates: bool ``[B, N]``: tokens that may go.
        real: bool ``[B, N]``: tokens that are not padding.
        padding_first: Padding goes before anything else; otherwise it stays where it is.
        present: How many candidates a prompt has at this cut; None = unknown when compiling.
        remaining: How many of them stay, those that are put in the place of others not counted; None likewise.
        before: Layer of the cut before this one, -1 for none or one in front of the first layer.
        facts: What is known of every token, ``[B, N, ...]`` by name: later cuts find it for the tokens that are left.
        attention: Returns a layer's attention over the current tokens alone: ``attention(layer)``.
        probe: Returns the next layer's attention as it would be if nothing were dropped: ``probe(rows)`` with int64
            ``[B, R]`` for the queries of some rows, or None for the last one. ``query`` holds those rows only.
            ``probe(rows, layer)`` reads on to a layer further behind. Those between are run over all tokens of the call
            for it alone, and over nothing else: it says something in the first call, see :meth:`in_first_call`.
        branch: Returns an attention's or an MLP's input and output: ``branch(layer, "attention" or "mlp")``.
        entry: Returns what the first layer reads, for the current tokens, ``[B, N, C]``.
        fail: Raises an error about this cut: ``fail(what, needed=..., help=...)``.
        input: Returns an input that the engine has beside the model's own, for the current tokens:
            ``input(name, dtype)`` gives ``[B, N]``.
        quota: How many candidates each row may keep, int64 ``[B, 1]``, where rows differ; None = they do not.
        old: Returns old entries of a layer's cache, those of the call's first R tokens: ``old(layer, "key")`` or
            ``"value"`` gives ``[B, Hkv, R, D]``. None where none are given.
    """

    b: Builder
    x: Any
    layer: int
    num_layers: int
    tokens: Any
    kept: Any
    first_call: Any
    candidates: Any
    real: Any
    padding_first: bool
    present: int | None
    remaining: int | None
    before: int
    attention: Callable[[int], CacheCut]
    probe: Callable[..., CacheCut]
    branch: Callable[[int, str], Branch]
    entry: Callable[[], Any]
    input: Callable[[str, torch.dtype], Any]
    fail: Callable[..., NoReturn]
    facts: dict[str, Any] = field(default_factory=dict)
    quota: Any = None
    old: Callable[[int, str], Any] | None = None

    def slots(self) -> Any:
        """Return int64 ``[N]``."""
        return self.b.arange(self.tokens, self.x)

    def last_candidate(self) -> Any:
        """Return the place of the last candidate, int64 ``[B, 1]``; -1 where there is none."""
        b = self.b
        return b.amax(b.where(self.candidates, b.unsqueeze(self.slots(), 0), -1), 1, keepdim=True)

    def rank(self) -> Any:
        """Return the place of every candidate among them, int64 ``[B, N]``."""
        return slot_rank(self.b, self.candidates)

    def pruned(self, chosen: Selected) -> Any:
        """Return bool ``[B, N]``: candidates that were not chosen."""
        b = self.b
        zeros = b.mul(b.cast(self.candidates, torch.int64), 0)
        ones = b.add(b.mul(chosen.index, 0), 1)
        kept = b.compare("gt", b.scatter(zeros, 1, chosen.index, ones), 0)
        return b.logical_and(self.candidates, b.logical_not(kept))

    def in_first_call(self, score: Any) -> Any:
        """Return a score ``[B, N]`` in the first call, zeros in others: what only it reads is not computed in them."""
        b = self.b
        zeros = b.mul(b.cast(self.real, torch.float32), 0.0)
        return b.call(torch.ops.tokcc.choose_by_size.default, zeros, score, [self.first_call], [1], [1])

    def rows_of(self, x: Any, rows: Any, axis: int = 1) -> Any:
        """Take rows ``[B, R]`` along an axis of ``[B, ...]``."""
        return self.b.call(torch.ops.tokcc.gather_tokens.default, x, rows, axis, 0)

    def probs(self, view: CacheCut, query: Any, rows: Any) -> Any:
        """Return the probabilities of some rows, fp32 ``[B, Hkv, G, R, N]``.

        Args:
            view: The attention.
            query: ``[B, H, R, D]``.
            rows: int64 ``[B, R]``: their places; None = the last row.
        """
        b = self.b
        real = b.unsqueeze(self.real, 1)
        if rows is None:
            return view.attend(query, 1, real, None)
        own = b.unsqueeze(rows, 2)  # [B, R, 1]
        slot = self.slots()
        seen = b.logical_and(b.compare("le", slot, own), real)
        return view.attend(query, b.size(rows, 1), b.logical_or(seen, b.compare("eq", slot, own)), None)

    def heads_of(self, probs: Any) -> Any:
        """Join the head axes of ``[B, Hkv, G, R, N]``: ``[B, H, R, N]``."""
        b = self.b
        shape = [b.size(probs, i) for i in range(5)]
        heads = b.mul_sizes(shape[1], shape[2])
        return b.reshape(probs, [shape[0], heads, shape[3], shape[4]])
