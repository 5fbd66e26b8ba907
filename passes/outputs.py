"""Output contracts: what each output looks like after a reduction."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tokcc.analysis.restoring import own_assign, restore
from tokcc.analysis.walk import Walk
from tokcc.config import Rows
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.plan import Plan

__all__ = ["OutputPlan", "contract_outputs", "plan_outputs"]


@dataclass(frozen=True)
class OutputPlan:
    """Outputs of the reduced program.

    Attributes:
        names: One per output.
        contracts: One per original output.
        restore_at: Stream node where the tokens are given back, or None.
        values: The values, filled in by :func:`contract_outputs`.
        named: Outputs that the policy names; `*` asks rows only of outputs that have tokens.
        mapped: Outputs that get a map when they are asked to be `reduced`, even where they have all tokens.
        whole: What that map of all tokens is called.
    """

    names: tuple[str, ...]
    contracts: tuple[Any, ...]
    restore_at: str | None = None
    values: tuple[Any, ...] = ()
    named: frozenset[str] = frozenset()
    mapped: frozenset[str] = frozenset()
    whole: str = "token_index"


def plan_outputs(program: Program, plan: Plan) -> OutputPlan:
    """Resolve output contracts and decide where full outputs get their tokens back.

    Raises:
        PlanError: For an output name that the model does not have.
    """
    names = program.output_names
    wanted = plan.outputs
    for name in wanted:
        if name != "*" and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise PlanError(
                f"the model has no output `{name}`",
                policy=plan.policy.where(("outputs", name)),
                needed="one of " + ", ".join(names),
                help=f"did you mean `{near[0]}`?" if near else None,
            )
    contracts = tuple(wanted.get(name, wanted.get("*", "full")) for name in names)
    named = frozenset(wanted) - {"*"}
    # A caller that reads the map finds it whatever the budget, also when that removes nothing.
    mapped = named if plan.reductions else frozenset(names)
    steps = plan.policy.policy.steps
    whole = "token_assign" if steps and all(step.node == "merge" for step in steps) else "token_index"
    restore_at = _restore_point(program, plan, contracts)
    return OutputPlan(names, contracts, restore_at, named=named, mapped=mapped, whole=whole)


def _restore_point(program: Program, plan: Plan, contracts: Sequence[Any]) -> str | None:
    """The last stream point, when a full output depends on it and nothing is cut behind it."""
    sites = plan.sites
    if not plan.reductions or not sites.layers:
        return None
    last = sites.layers[-1].block_output
    if last is None or not sites.has_tokens(last):
        return None
    if any(sites.order[r.cut] >= sites.order[last] for r in plan.reductions):
        return None
    for value, contract in zip(program.output_values, contracts, strict=True):
        carries = (
            isinstance(value, fx.Node) and sites.has_tokens(value.name) and sites.order[value.name] >= sites.order[last]
        )
        if carries and contract == "full":
            others = [
                c for v, c in zip(program.output_values, contracts, strict=True) if v is not value and c == "reduced"
            ]
            return None if others else last
    return None


def contract_outputs(walk: Walk, outputs: OutputPlan, values: Sequence[Any]) -> OutputPlan:
    """Apply the contracts to the walk's outputs."""
    result: list[Any] = []
    extra: list[tuple[str, Any]] = []
    for name, contract, value in zip(outputs.names, outputs.contracts, values, strict=True):
        if not isinstance(value, Value):
            result.append(value)
            continue
        if value.totals:
            walk.ctx.fail(f"output `{name}` is a sum over tokens, and dropped tokens are missing from it")
        own = value
        if contract == "reduced":
            extra += _maps(walk, name, own, whole=outputs.whole if name in outputs.mapped else None)
        elif contract == "last_token" or isinstance(contract, Rows):
            chosen = (-1,) if contract == "last_token" else contract.rows
            own = _rows(walk, name, own, chosen, required=name in outputs.named)
        elif own.reduced:
            with walk.builder.inserting("restore"):
                own = walk.restored(own)
        if contract in ("full", "reduced"):
            extra += _told(walk, name, value, full=contract == "full")
        result.append(own)
    names = (*outputs.names, *(name for name, _ in extra))
    return OutputPlan(names, outputs.contracts, outputs.restore_at, (*result, *(handle for _, handle in extra)))


def _rows(walk: Walk, name: str, value: Value, rows: Sequence[int], *, required: bool) -> Value:
    """Only some rows of an output, ``[B, len(rows), ...]``; the demand pass then computes no others."""
    b = walk.builder
    if value.reduced:
        value = walk.restored(value)
    axis = next((i for i, a in enumerate(value.axes) if any(f.space is walk.tokens for f in a)), None)
    if axis is None and not required:
        return value
    if axis is None:
        walk.ctx.fail(f"output `{name}` has no token axis, so rows of it cannot be chosen")
    parts = []
    length = value.old[axis]
    for row in rows:
        # Demand slicing follows rows that are counted from the front.
        row = row + length if row < 0 and isinstance(length, int) else row
        stop = None if row == -1 else row + 1
        parts.append(b.slice(value.handle, axis, row, stop))
    handle = b.cat(parts, axis)
    axes = (*value.axes[:axis], (), *value.axes[axis + 1 :])
    return value.having(handle=handle, axes=axes)


def _maps(walk: Walk, name: str, value: Value, *, whole: str | None) -> list[tuple[str, Any]]:
    """The extra output that says where the tokens of a reduced output come from.

    Args:
        walk: The walk.
        name: Of the output.
        value: The output.
        whole: What the map of an output that has all tokens is called; None = there is none.
    """
    for axis in value.axes:
        for factor in axis:
            space = factor.space
            if space is None or space.is_batch or not (space.reduced or whole):
                continue
            with walk.builder.inserting("restore"):
                if not space.reduced:
                    index = walk.builder.arange(space.size, value.handle)
                    return [(f"{name}.{whole}", _per_sample(walk, index))]
                # The caller of a model without a mask cannot know which slots hold a token.
                counted = space.valid is not None and space.root.real is None
                valid = [(f"{name}.token_valid", space.valid)] if counted else []
                if all((step.tail_of or (step,))[0].assign is not None for step in space.chain[1:]):
                    return [(f"{name}.token_assign", _assign(walk, space)), *valid]
                return [(f"{name}.token_index", _per_sample(walk, walk.ctx.index_between(space.root, space))), *valid]
    return []


def _told(walk: Walk, name: str, value: Value, *, full: bool) -> list[tuple[str, Any]]:
    """Return the extra outputs that tell something about the tokens of an output, ``[B, K]``: 0 where there is none.

    Args:
        walk: The walk.
        name: Of the output.
        value: The output, before tokens are given back.
        full: They are given back: dropped ones get 0.
    """
    space = next((f.space for axis in value.axes for f in axis if f.space is not None and not f.space.is_batch), None)
    found: list[tuple[str, Any]] = []
    for step in [] if space is None else space.chain:
        whole, first = step.tail_of or (step, 0)
        for fact, handle in whole.facts.items():
            assert space is not None
            with walk.builder.inserting("restore"):
                found.append((f"{name}.{fact}", _fact(walk, handle, first, step, space, full=full)))
    return found


def _fact(walk: Walk, handle: Any, first: int, step: TokenSpace, space: TokenSpace, *, full: bool) -> Any:
    b = walk.builder
    handle = b.slice(handle, 1, first) if first else handle
    if step is not space:
        index = _per_sample(walk, walk.ctx.index_between(step, space))
        handle = b.gather(handle, 1, index)
    if space.valid is not None:
        handle = b.where(space.valid, handle, 0)
    if not full or not space.reduced:
        return handle
    assert walk.batch is not None
    axes = ((Factor(walk.batch, walk.batch.old),), (Factor(space, space.root.old),))
    return restore(walk.ctx, Value(handle, axes, (walk.batch.old, space.root.old)), 1).handle


def _per_sample(walk: Walk, index: Any) -> Any:
    b = walk.builder
    if len(b.shape(index)) == 2:
        return index
    assert walk.batch is not None
    return b.expand(b.unsqueeze(index, 0), [walk.batch.size, -1])


def _assign(walk: Walk, space: TokenSpace) -> Any:
    composed: Any = None
    for step in space.chain[1:]:
        own = own_assign(walk.ctx, step)
        composed = own if composed is None else walk.builder.gather(own, 1, composed)
    return composed
