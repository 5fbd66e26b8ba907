"""Old cache entries in the places of tokens that are not computed anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_of
from tokcc.passes.cache.visible import slot_rank
from tokcc.passes.inputs import EngineInput
from tokcc.passes.prompt.refill_plan import RefillPlan

__all__ = ["Refill"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Refill:
    """The old entries of a call's first R tokens.

    Attributes:
        plan: What is given.
        mask: A tensor ``[B, any]``, for batch and device.
        places: int64 ``[B, R]``: positions at which old keys were turned.
        rows: R.
        index: int64 ``[B, K]``, ascending: tokens that go on behind the cut; None in front of it.
        source: int64 ``[B, S]``: where each token's entry is among R old and K new ones.
    """

    plan: RefillPlan
    mask: Any
    places: Any
    rows: Any
    index: Any = None
    source: Any = None

    @classmethod
    def of(cls, b: Builder, plan: RefillPlan, mask: Any) -> Refill:
        """Declare the inputs."""
        places = _read(b, plan.places, mask)
        return cls(plan, mask, places, b.size(places, 1))

    def old(self, b: Builder, layer: int, part: str) -> Any:
        """Return ``[B, Hkv, R, D]``."""
        return _read(b, self.plan.entries[layer, part], self.mask)

    def computed(self, b: Builder, share: Fraction, tokens: Any) -> Any:
        """Return K: a share of the R, and all other tokens."""
        anew: Any = 0
        if share:
            anew = b.floordiv_sizes(b.mul_sizes(self.rows, share.numerator), share.denominator)
        rest = b.sub_sizes(tokens, self.rows)
        # What shape checks try out has more old entries than tokens.
        return b.own_size(b.max_sizes(b.add_sizes(rest, anew), 0))

    def quota(self, b: Builder, share: Fraction, candidates: Any) -> Any:
        """Return the share of each row's candidates ``[B, N]``, int64 ``[B, 1]``."""
        count = b.sum(b.cast(candidates, torch.int64), 1, keepdim=True)
        scaled = b.mul(count, share.numerator)
        return b.call(aten.div.Tensor_mode, scaled, share.denominator, rounding_mode="floor")

    def behind(self, b: Builder, index: Any, tokens: Any) -> Refill:
        """Return it with the tokens that go on."""
        slot = b.arange(tokens, index)
        zeros = b.mul(b.add(b.unsqueeze(slot, 0), b.mul(b.sum(index, 1, keepdim=True), 0)), 0)  # [B, S]
        new = b.compare("gt", b.scatter(zeros, 1, index, b.add(b.mul(index, 0), 1)), 0)
        rank = slot_rank(b, new)
        source = b.where(new, b.add(rank, self.rows), b.unsqueeze(slot, 0))
        return replace(self, index=index, source=source)

    def filled(self, b: Builder, layer: int, key: Any, value: Any, env: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        """Return the keys and values of all tokens of the call, ``[B, Hkv, S, D]``.

        Args:
            b: The builder.
            layer: Behind the cut.
            key: Those of the tokens that go on, ``[B, Hkv, K, D]``.
            value: Likewise.
            env: Handles of the model's nodes.
        """
        turn = self.plan.turns[layer]
        # Turning by a and then by b is turning by a + b.
        own = run_of(b, env[turn.positions], 1, 0, self.rows)
        moved = turn.replay(b.call, self.old(b, layer, "key"), b.sub(own, self.places), dict(env))
        pairs = ((moved, key), (self.old(b, layer, "value"), value))
        gather = torch.ops.tokcc.gather_tokens.default
        old, new = (b.call(gather, b.cat(list(pair), 2), self.source, 2, 0) for pair in pairs)
        return old, new

    def slots(self, b: Builder, past: Any) -> Any:
        """Return the slots of the tokens that go on, int64 ``[B, K]``."""
        return b.add(self.index, past)

    def allowed(self, b: Builder, slots: Any, own: Any, real: Any) -> Any:
        """Return what each of them sees, bool ``[B, K, L]``: everything in front of it, computed anew or not.

        Args:
            b: The builder.
            slots: int64 ``[L]``.
            own: int64 ``[B, K]``.
            real: bool ``[B, L]``.
        """
        return b.logical_and(b.compare("le", slots, b.unsqueeze(own, 2)), b.unsqueeze(real, 1))


def _read(b: Builder, spec: EngineInput, mask: Any) -> Any:
    sizes = {"B": b.size(mask, 0)}
    shape = [sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape]
    return b.input(spec.name, shape, spec.dtype, b.device(mask))
