"""Budgets: how many tokens a reduction keeps, as exact arithmetic on ints, symbolic sizes and per-sample counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

from tokcc.config import Budget, LoadedPolicy, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.builder import Builder

__all__ = ["Count", "planned_counts", "refuse_budget", "resolve_budget"]

aten = torch.ops.aten
Rounding = Literal["ceil", "floor", "round"]


@dataclass(frozen=True)
class Count:
    """Kept tokens as a function of the candidates: ``n -> round(share * n)``, ``min(n, tokens)`` or ``n - remove``.

    At least one candidate is kept.

    Fractions are exact decimals (0.7 is 7/10), so that the same number comes out at build time, in a symbolic graph
    and per sample.

    Attributes:
        kind: Which form.
        amount: Share, tokens or removed tokens.
        rounding: For shares; ``round`` rounds halves up.
        of_initial: Apply a share to the model's original number of candidates.
    """

    kind: Literal["share", "tokens", "remove"]
    amount: Fraction
    rounding: Rounding = "ceil"
    of_initial: bool = False

    @property
    def nothing(self) -> bool:
        """True when no token is ever removed."""
        return (self.kind == "share" and self.amount == 1) or (self.kind == "remove" and self.amount == 0)

    def kept(self, b: Builder, current: Any, initial: Any) -> Any:
        """Return how many of ``current`` candidates stay (int or size handle)."""
        if self.kind == "share":
            base = initial if self.of_initial else current
            return b.min_sizes(self._rounded(b, base), current) if self.of_initial else self._rounded(b, base)
        if self.kind == "tokens":
            return b.min_sizes(int(self.amount), current)
        return b.max_sizes(b.sub_sizes(current, int(self.amount)), 1)

    def _rounded(self, b: Builder, n: Any) -> Any:
        p, q = self.amount.numerator, self.amount.denominator
        if self.rounding == "ceil":
            return b.floordiv_sizes(b.add_sizes(b.mul_sizes(n, p), q - 1), q)
        if self.rounding == "floor":
            return b.max_sizes(b.floordiv_sizes(b.mul_sizes(n, p), q), 1)
        return b.max_sizes(b.floordiv_sizes(b.add_sizes(b.mul_sizes(n, 2 * p), q), 2 * q), 1)

    def kept_per_sample(self, b: Builder, current: Any, initial: Any) -> Any:
        """Return the same for int64 tensors ``[B]`` of true candidate counts."""
        if self.kind == "tokens":
            return b.call(aten.clamp_max.default, current, int(self.amount))
        if self.kind == "remove":
            return b.call(aten.clamp_min.default, b.sub(current, int(self.amount)), 1)
        base = initial if self.of_initial else current
        p, q = self.amount.numerator, self.amount.denominator
        up = {"ceil": (p, q - 1, q), "floor": (p, 0, q), "round": (2 * p, q, 2 * q)}[self.rounding]
        scaled = b.add(b.mul(base, up[0]), up[1])
        kept = b.call(aten.div.Tensor_mode, scaled, up[2], rounding_mode="floor")
        if self.rounding != "ceil":
            kept = b.call(aten.clamp_min.default, kept, 1)
        return b.call(aten.minimum.default, kept, current) if self.of_initial else kept


def _fraction(value: float) -> Fraction:
    return Fraction(str(value))


def planned_counts(
    policy: LoadedPolicy, number: int, step: Step, layers: tuple[int, ...], num_layers: int
) -> list[Count]:
    """Return one :class:`Count` for each chosen layer of a policy's step.

    Args:
        policy: The policy.
        number: 0-based place of the step.
        step: The step.
        layers: The chosen layers, ascending.
        num_layers: Depth of the model.

    Raises:
        PlanError: When the step's budget has no meaning for these layers.
    """
    try:
        return resolve_budget(step.budget, layers, num_layers)
    except ValueError as error:
        raise PlanError(
            str(error),
            policy=policy.where(("steps", number, "budget")),
            help=f"choose as many layers with `at: {{layers: ...}}`, or a budget for {len(layers)}",
        ) from error


def refuse_budget(policy: LoadedPolicy, number: int, kind: str, counts: Sequence[Count]) -> None:
    """Refuse the budget of a step whose selector needs none.

    Args:
        policy: The policy.
        number: Place of the step.
        kind: Of the selector.
        counts: What the step's budget came to.

    Raises:
        PolicyError: There is one.
    """
    if not all(count.nothing for count in counts):
        raise PolicyError(
            f"the selector `{kind}` knows itself how much is read, and a budget would mean nothing",
            policy=policy.where(("steps", number, "budget")),
            help=f"leave it out, and give `{kind}` its own parameters",
        )


def resolve_budget(budget: Budget, layers: tuple[int, ...], num_layers: int) -> list[Count]:
    """Return one :class:`Count` for each chosen layer.

    Args:
        budget: The step's budget.
        layers: The chosen layers, ascending.
        num_layers: Depth of the model (ToMe's schedule runs over all of it).

    Raises:
        ValueError: When the budget has no meaning for these layers.
    """
    initial = budget.of == "initial"
    if budget.schedule is not None:
        if len(budget.schedule) != len(layers):
            raise ValueError(f"the schedule has {len(budget.schedule)} entries for {len(layers)} layers")
        return [
            Count("tokens", Fraction(entry))
            if isinstance(entry, int) and not isinstance(entry, bool)
            else Count("share", _fraction(entry), budget.rounding, initial)
            for entry in budget.schedule
        ]
    if budget.remove is not None:
        return [Count("remove", Fraction(r)) for r in _removals(budget, layers, num_layers)]
    if budget.tokens is not None:
        return [Count("tokens", Fraction(budget.tokens))] * len(layers)
    if budget.stride is not None:
        return [Count("share", Fraction(1, budget.stride), "floor", initial)] * len(layers)
    if budget.total_remove is not None:
        rate = (1.0 - budget.total_remove) ** (1.0 / len(layers))
        share = Fraction(rate).limit_denominator(10**6)
        return [Count("share", share, budget.rounding, initial)] * len(layers)
    if budget.keep is not None:
        return [Count("share", share, budget.rounding, initial) for share in _shares(budget, layers)]
    raise ValueError(f"`{budget.amount}` is not a budget of prune and merge steps")


def _removals(budget: Budget, layers: tuple[int, ...], num_layers: int) -> list[int]:
    """ToMe's schedule: linear in the layer, truncated; inflection 0 is constant, -1 falls from 2r to 0."""
    assert budget.remove is not None
    first = int(budget.remove * (1 - _fraction(budget.inflection or 0.0)))
    last = 2 * budget.remove - first
    steps = max(1, num_layers - 1)
    return [int(first + Fraction(last - first) * layer / steps) for layer in layers]


def _shares(budget: Budget, layers: tuple[int, ...]) -> list[Fraction]:
    assert budget.keep is not None
    final = _fraction(budget.keep)
    if budget.compound:
        return [final ** (i + 1) for i in range(len(layers))]
    if budget.ramp is None:
        return [final] * len(layers)
    warm = max(budget.ramp.warmup_layers, math.ceil(budget.ramp.warmup_fraction * len(layers) - 1e-9))
    rest = len(layers) - warm
    return [
        Fraction(1) if i < warm else max(Fraction(1, 100), 1 + (final - 1) * Fraction(i - warm + 1, rest))
        for i in range(len(layers))
    ]
