"""What cache pieces work with: the cache of one layer after its attention, in canonical layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.visible import slot_rank

__all__ = ["LOWEST", "PROTECTED", "CacheCut", "Retained"]

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
    """

    index: Any


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
        age = b.call(aten.flip.default, self.slots(), [0])
        return b.compare("lt", age, count)

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
        groups = self.heads // self.kv_heads
        start = b.sub_sizes(self.new, rows)
        query = b.slice(self.query, 2, start, None)  # [B, H, R, D]
        width = b.shape(query)[3]
        grouped = b.reshape(query, [b.size(query, 0), self.kv_heads, groups, rows, width])
        keys = b.unsqueeze(b.transpose(self.key, 2, 3), 2)  # [B, Hkv, 1, D, L]
        logits = b.cast(b.matmul(b.mul(grouped, self.scale), keys), torch.float32)
        if self.softcap:
            logits = b.mul(b.call(aten.tanh.default, b.div(logits, self.softcap)), self.softcap)
        if temperature is not None:
            logits = b.div(logits, temperature)
        slot = self.slots()
        own = b.unsqueeze(b.slice(slot, 0, b.sub_sizes(self.total, rows), None), 1)  # [R, 1]
        seen = b.logical_and(b.compare("le", slot, own), b.unsqueeze(self.real, 1))
        allowed = b.logical_or(seen, b.compare("eq", slot, own))  # [B, R, L]
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
        return b.parts(b.call(op, query, self.key, width, self.real, 0, self.scale, 0.0), 2)[1]
