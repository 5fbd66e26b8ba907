"""Finding the states that a decoder carries from call to call, and the step sizes of the scans that make them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import tokcc.kernels  # registers the operations
from tokcc.ir.builder import same_size
from tokcc.ir.program import Program
from tokcc.ir.reach import made_of

__all__ = ["StateSite", "seen_tokens", "state_sites"]

aten = torch.ops.aten
assert tokcc.kernels is not None
_SAME = {aten.clone.default, aten._to_copy.default}
_MAX_STEPS = 8


@dataclass(frozen=True)
class StateSite:
    """The scan of one layer whose state leaves the graph and comes back. Nodes are given by name.

    Attributes:
        layer: 0-based, in execution order.
        scan: The recurrence, ``[S, B, D, N]``.
        step: The step sizes ``[S, B, D, 1]``: a factor of the update, and of the decay's logarithm. Where one is 0 the
            state passes the token unchanged.
        rates: What the step sizes are multiplied with in that logarithm, broadcasting with ``[S, B, D, N]``: negative.
        channels: D.
        past: Input with the state before the first token ``[B, D, N]``.
        present: Position of the state after the last token among the outputs.
    """

    layer: int
    scan: str
    step: str
    rates: str
    channels: int
    past: str
    present: int


def state_sites(program: Program) -> tuple[StateSite, ...]:
    """Return the scans that begin from an input and whose last state leaves the program; often none."""
    scans = [n for n in program.graph.nodes if n.target is torch.ops.tokcc.recurrence.default]
    found: list[StateSite] = []
    for scan in scans:
        carried = _carried(program, scan)
        factors = _factors(program, scan)
        if carried is not None and factors is not None:
            step, rates = factors
            channels = int(step.meta["val"].shape[2])
            found.append(StateSite(len(found), scan.name, step.name, rates.name, channels, *carried))
    return tuple(found)


def seen_tokens(program: Program, sites: tuple[StateSite, ...]) -> str | None:
    """Return the input that says which tokens there were so far: integers or bools ``[B, P + S]``, or None."""
    nodes = {node.name: node for node in program.graph.nodes}
    ancestors = made_of([nodes[site.step] for site in sites])
    for node in program.user_inputs:
        fake = node.meta.get("val")
        if node in ancestors and "mask" in node.name and isinstance(fake, torch.Tensor) and fake.ndim == 2:
            return node.name
    return None


def _carried(program: Program, scan: fx.Node) -> tuple[str, int] | None:
    """Return the input that a scan begins from, and where its last state leaves."""
    before = _through(scan.args[3]) if len(scan.args) > 3 else None
    if before not in program.user_inputs or scan.args[2] != 0:
        return None
    for position, value in enumerate(program.output_values):
        last = _through(value)
        taken = isinstance(last, fx.Node) and last.target is aten.select.int
        if taken and last.args[0] is scan and tuple(last.args[1:]) == (0, -1):
            return before.name, position
    return None


def _factors(program: Program, scan: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return step sizes and rates of a scan with ``decay = exp(rates * step)`` and ``update = step * ...``."""
    decay: Any = scan.args[0]
    if decay.target is not aten.exp.default or decay.args[0].target is not aten.mul.Tensor:
        return None
    inputs = set(program.user_inputs)
    fed = {node: not inputs.isdisjoint(made_of([node])) for node in decay.args[0].args if isinstance(node, fx.Node)}
    steps, rates = [n for n in fed if fed[n]], [n for n in fed if not fed[n]]
    if len(steps) != 1 or len(rates) != 1 or steps[0] not in _product(scan.args[1]):
        return None
    (step,), whole = steps, scan.meta["val"].shape
    shape = step.meta["val"].shape
    scalar = len(shape) == len(whole) == 4 and shape[3] == 1
    if not scalar or not all(map(same_size, shape[:3], whole[:3])) or not isinstance(shape[2], int):
        return None
    return step, rates[0]


def _product(node: Any, depth: int = 0) -> Iterator[Any]:
    """Yield the factors of a value."""
    yield node
    if isinstance(node, fx.Node) and node.target in {aten.mul.Tensor, *_SAME} and depth < _MAX_STEPS:
        for operand in node.args:
            yield from _product(operand, depth + 1)


def _through(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in _SAME:
        value = value.args[0]
    return value
