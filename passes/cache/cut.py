"""What cache pieces work with: the cache of one layer after its attention, in canonical layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_from
from tokcc.passes.cache.visible import slot_rank
from tokcc.passes.capping import capped

__all__ = ["LOWEST", "PROTECTED", "CacheCut", "Retained", "behind"]

aten = torch.ops.aten

LOWEST = -1e30
"""Rating of what must go first: padding."""
PROTECTED = 1e30
"""Rating of what stays in any case."""


@dataclass(frozen=True)
class Retained:
    """A selection of cache entries.

    Attributes:
        index: int64 ``[B, Hkv, K]``, ascending.
        weight: fp32 ``[B, Hkv, K]``: how many tokens an entry stands for from now on; 0 = it is there to fill up the
            row and is attended by nobody. Selectors with `weighted` give it.
    """

    index: Any
    weight: Any = None


@dataclass
class CacheCut:
    """The cache of one layer in one call, before anything is evicted.

    ``P`` slots are in the cache, the call brings ``S`` tokens, ``L = P + S``.

    Attributes:
        b: The builder.
        layer: 0-based layer.
        num_layers: Depth of the model.
        query: ``[B, H, S, D]``, rotated where the model rotates.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        real: bool ``[B, L]``: slots that are not padding; padding comes first.
        received: fp32 ``[B, Hkv, L]``: attention that each slot received in this call, see ``cached_attention``.
        past: P.
        new: S.
        total: L.
        seen: Tokens of the sequence so far, evicted ones and padding included.
        scale: Factor of the logits.
        softcap: Cap of the logits, 0 = none.
        capacity: Slots that stay, K (int or size handle).
        sinks: Protected first tokens.
        recent: Protected last tokens.
        states: What earlier calls left, fp32 ``[B, Hkv, P]`` by name.
        left: What this call leaves, fp32 ``[B, Hkv, L]`` by name: filled in by scores.
        budget: What the capacity was planned from.
        decides: bool ``[1]``: whether something is evicted in this call; None = in every one.
        weight: fp32 ``[B, Hkv, L]``: how many tokens a slot stands for, where that is carried along.
        bias: What the attention adds to the logits, fp32 ``[B, Hkv, L]``: the logarithm of the weight, and what the
            policy says; None = nothing.
        positions: True positions of the call's tokens, int64 ``[B, S]``; None = the model takes none.
        unturned: The queries before they are turned by their positions, for scores that look ahead; where the model
            does not turn them, the queries as they are.
        turn: Turns queries ``[B, any, S, D]`` by positions ``[B, S]``; None = the model does not turn them.
        ids: The call's tokens, int64 ``[B, S]``; None = the model takes something else.
        window: Slots that a query sees, its own included; 0 = all.
        wide: The same with the tokens that are read beside the call's, which stand behind them; None = there are none.
    """

    b: Builder
    layer: int
    num_layers: int
    query: Any
    key: Any
    value: Any
    real: Any
    received: Any
    past: Any
    new: Any
    total: Any
    seen: Any
    scale: float
    softcap: float
    capacity: Any
    sinks: int
    recent: int
    states: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)
    budget: Any = None
    decides: Any = None
    weight: Any = None
    bias: Any = None
    positions: Any = None
    unturned: Any = None
    turn: Callable[[Any, Any], Any] | None = None
    ids: Any = None
    window: int = 0
    wide: CacheCut | None = None

    def turned(self, query: Any, positions: Any) -> Any:
        """Return queries ``[B, any, S, D]`` as they would be at other positions, int64 ``[B, S]``."""
        return query if self.turn is None else self.turn(query, positions)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.b.shape(self.query)[1])

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return int(self.b.shape(self.key)[1])

    def slots(self) -> Any:
        """Return int64 ``[L]``."""
        return self.b.arange(self.total, self.key)

    def age(self) -> Any:
        """Return how many slots are behind each, int64 ``[L]``: L - 1, ..., 0."""
        return self.b.call(aten.flip.default, self.slots(), [0])

    def is_text(self) -> Any:
        """Return bool ``[1]``: the call has more than one token."""
        b = self.b
        extra = b.amax(b.arange(self.new, self.key), 0, keepdim=True)  # S - 1
        return b.compare("gt", extra, 0)

    def rank(self) -> Any:
        """Return the place of every slot among the real ones of its sample, int64 ``[B, L]``."""
        return slot_rank(self.b, self.real)

    def protected(self) -> Any:
        """Return bool ``[B, 1, L]``: sinks and recent tokens; None when nothing is protected."""
        b = self.b
        parts = []
        if self.sinks:
            parts.append(b.compare("lt", self.rank(), self.sinks))
        if self.recent:
            parts.append(b.unsqueeze(self.newest(self.recent), 0))
        if not parts:
            return None
        both = parts[0] if len(parts) == 1 else b.logical_or(parts[0], parts[1])
        return b.unsqueeze(both, 1)

    def newest(self, count: int) -> Any:
        """Return bool ``[L]``: the last ``count`` slots."""
        b = self.b
        # Counted from the end, so that no size enters the comparison.
        return b.compare("lt", self.age(), count)

    def last_slot(self) -> Any:
        """Return L - 1 as int64 ``[1]``."""
        return self.b.amax(self.slots(), 0, keepdim=True)

    def probs(self, rows: Any, temperature: Any = None) -> Any:
        """Return the probabilities of the last ``rows`` queries, fp32 ``[B, Hkv, G, R, L]``.

        Written out beside the attention; each query sees the slots up to its own.

        Args:
            rows: R.
            temperature: Divides the logits: fp32, of five axes; None = 1.
        """
        b = self.b
        slot = self.slots()
        own = b.unsqueeze(b.slice(slot, 0, b.sub_sizes(self.total, rows), None), 1)  # [R, 1]
        seen = b.logical_and(b.compare("le", slot, own), b.unsqueeze(self.real, 1))
        allowed = b.logical_or(seen, b.compare("eq", slot, own))  # [B, R, L]
        query = b.slice(self.query, 2, b.sub_sizes(self.new, rows), None)
        return self.attend(query, rows, allowed, temperature)

    def probs_at(self, tokens: Any) -> Any:
        """Return the probabilities of some of the call's queries, fp32 ``[B, Hkv, G, R, L]``.

        Args:
            tokens: int64 ``[R]``: which of the S.
        """
        b = self.b
        own = b.unsqueeze(self.slots_of(tokens), 1)  # [R, 1]
        slot = self.slots()
        seen = b.logical_and(b.compare("le", slot, own), b.unsqueeze(self.real, 1))
        allowed = b.logical_or(seen, b.compare("eq", slot, own))  # [B, R, L]
        query = b.call(aten.index_select.default, self.query, 2, tokens)
        return self.attend(query, b.size(tokens, 0), allowed, None)

    def slots_of(self, tokens: Any) -> Any:
        """Return the slots of some of the call's tokens, int64 ``[R]``."""
        return self.b.call(aten.index_select.default, self.b.slice(self.slots(), 0, self.past, None), 0, tokens)

    def probs_of(self, query: Any, rows: Any) -> Any:
        """Return what queries that are not in the sequence would attend to, fp32 ``[B, Hkv, G, R, L]``: all real slots.

        Args:
            query: ``[B, H, R, D]``, turned.
            rows: R.
        """
        return self.attend(query, rows, self.b.unsqueeze(self.real, 1), None)

    def attended(self, allowed: Any, own: Any = None) -> Any:
        """Return the values that the call's queries attend to, ``[B, H, S, Dv]``, written out.

        Args:
            allowed: bool ``[B, S, L]``: what each sees, its own slot excepted, which it always sees.
            own: int64 ``[B, Q]``: the slots of the queries, where they are not the last S.
        """
        b, rows = self.b, self.new
        if own is None:
            own = b.unsqueeze(run_from(b, self.slots(), 0, self.past, self.new), 1)  # [S, 1]
        else:
            own, rows = b.unsqueeze(own, 2), b.size(own, 1)  # [B, Q, 1]
        probs = self.attend(self.query, rows, b.logical_or(allowed, b.compare("eq", self.slots(), own)), None)
        made = b.matmul(b.cast(probs, b.dtype(self.value)), b.unsqueeze(self.value, 2))  # [B, Hkv, G, S, Dv]
        return b.call(aten.flatten.using_ints, made, 1, 2)

    def attend(self, query: Any, rows: Any, allowed: Any, temperature: Any) -> Any:
        """Return the softmax of R queries over the slots that are allowed, fp32 ``[B, Hkv, G, R, L]``.

        Args:
            query: ``[B, H, R, D]``.
            rows: R.
            allowed: bool ``[B, R or 1, L]``.
            temperature: Divides the logits; None = 1.
        """
        b = self.b
        width = b.shape(query)[3]
        grouped = b.reshape(query, [b.size(query, 0), self.kv_heads, self.heads // self.kv_heads, rows, width])
        keys = b.unsqueeze(b.transpose(self.key, 2, 3), 2)  # [B, Hkv, 1, D, L]
        logits = capped(b, b.cast(b.matmul(b.mul(grouped, self.scale), keys), torch.float32), self.softcap)
        if temperature is not None:
            logits = b.div(logits, temperature)
        if self.bias is not None:
            logits = b.add(logits, b.unsqueeze(b.unsqueeze(self.bias, 2), 3))
        allowed = b.unsqueeze(b.unsqueeze(allowed, 1), 1)
        return b.softmax(b.where(allowed, logits, LOWEST), 4)

    def real_rows(self, rows: Any) -> Any:
        """Return fp32 ``[B, 1, 1, R, 1]``: 1 for the last queries that are not padding."""
        b = self.b
        real = b.cast(b.slice(self.real, 1, b.sub_sizes(self.total, rows), None), torch.float32)
        return b.unsqueeze(b.unsqueeze(b.unsqueeze(real, 1), 1), 4)

    def received_at(self, temperature: Any) -> Any:
        """Return ``received`` as it would be at a temperature, fp32 ``[B, Hkv, L]``: a second softmax over all rows.

        No S x L matrix is held, unless the model caps its logits: the cap stands between them and the temperature.

        Args:
            temperature: fp32 ``[B, 1, 1, 1]``.
        """
        b = self.b
        if self.softcap:
            probs = self.probs(self.new, b.unsqueeze(temperature, 4))
            return b.mean(b.sum(b.mul(probs, self.real_rows(self.new)), 3), 2)
        query = b.cast(b.div(self.query, temperature), b.dtype(self.query))
        width = b.slice(self.value, 3, 0, 1)  # the attended values are not wanted
        op = torch.ops.tokcc.cached_attention.default
        return b.parts(b.call(op, query, self.key, width, self.real, 0, self.scale, 0.0, self.bias), 2)[1]


def behind(cut: CacheCut, front: int) -> CacheCut:
    """Return the cut without the first slots, which every cache of the layer has; states have no place for them."""
    b = cut.b

    def rest(x: Any, axis: int) -> Any:
        return None if x is None else b.slice(x, axis, front, None)

    return replace(
        cut,
        key=rest(cut.key, 2),
        value=rest(cut.value, 2),
        real=rest(cut.real, 1),
        received=rest(cut.received, 2),
        past=b.sub_sizes(cut.past, front),
        total=b.sub_sizes(cut.total, front),
        weight=rest(cut.weight, 2),
        bias=rest(cut.bias, 2),
    )
