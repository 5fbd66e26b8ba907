"""Choices that rounding decides: where an engine chose otherwise, is what it chose as good, and what follows from it?

A top-k, an argmax or a comparison turns numbers into a choice. Two runtimes round differently, so where two numbers are
equal but for rounding they may choose differently, and what is computed from there on has nothing in common. That is
no fault of an engine, and outputs alone do not show whether it was one. So the engine is written a second time with
its choices as outputs, the reference is run again on them, each is held against the numbers it was made from, and
outputs are compared given the same choices.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokcc.backends.feeds import Feeds
from tokcc.ir.edit import is_float
from tokcc.ir.program import Program
from tokcc.kernels.cover_select.reference import reference as cover_select
from tokcc.kernels.dpp_select.reference import reference as dpp_select
from tokcc.kernels.greedy_select.reference import reference as greedy_select
from tokcc.kernels.picking import Following, Pick, best, largest

__all__ = ["Decision", "Replayed", "decisions", "replay", "watching"]

aten = torch.ops.aten

_NEAR = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Numbers this near, as a share of their sample's largest, go either way: a tenth of what parity allows outputs.

Of numbers in float32 that are made of numbers in half precision, what holds for those holds.
"""
_OUT_OF_SIGHT = 1e29
"""Larger numbers mark what cannot be chosen, and are no scale."""


@dataclass(frozen=True)
class Decision:
    """A choice in a program.

    Attributes:
        node: The operation that makes it.
        shown: The node whose value is the choice: the operation, or its indices.
        near: Numbers this near, as a share of their sample's largest, go either way.
    """

    node: fx.Node
    shown: fx.Node
    near: float

    @property
    def output(self) -> str:
        """What an engine that shows the choice calls it."""
        return f"decision.{self.shown.name}"


@dataclass(frozen=True)
class Replayed:
    """The reference's outputs given an engine's choices.

    Attributes:
        outputs: As the reference gives them.
        differing: Elements of choices that differ.
        elements: Elements of all choices.
        refused: The choice that rounding does not explain, and why; None = all are explained.
    """

    outputs: list[Tensor]
    differing: int
    elements: int
    refused: str | None = None


Shortfall = Callable[..., Tensor]
"""``f(chosen, *args, **kwargs)``: how much worse than the best a choice is, ``>= 0``, infinite for no choice."""


def _extreme(sign: float) -> Shortfall:
    def shortfall(chosen: Tensor, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        x = x * sign
        if dim is None:
            x, chosen, dim = x.flatten(), chosen.reshape(1), 0
        elif not keepdim:
            chosen = chosen.unsqueeze(dim)
        if not _inside(chosen, x.shape[dim]):
            return torch.tensor(torch.inf)
        return x.amax(dim, keepdim=True) - x.gather(dim, chosen)

    return shortfall


def _ranked(chosen: Tensor, x: Tensor, dim: int, *, descending: bool, in_order: bool = True) -> Tensor:
    """Hold each number against the one that should stand in its place: of equal ones any may."""
    if not _inside(chosen, x.shape[dim]) or _repeats(chosen, dim):
        return torch.tensor(torch.inf)
    found = x.gather(dim, chosen)
    if not in_order:
        found = found.sort(dim, descending=descending).values
    wanted = x.sort(dim, descending=descending).values.narrow(dim, 0, chosen.shape[dim])
    # Equal infinities are no distance.
    return torch.where(found == wanted, 0.0, (found - wanted).abs())


def _topk(chosen: Tensor, x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Tensor:
    del k
    return _ranked(chosen, x, dim, descending=largest, in_order=sorted)


def _sort(chosen: Tensor, x: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> Tensor:
    return _ranked(chosen, x, dim, descending=descending)


def _topk_select(chosen: Tensor, score: Tensor, k: int, ascending: bool) -> Tensor:
    del k
    short = _ranked(chosen, score, -1, descending=True, in_order=not ascending)
    return _in_sequence(short, chosen) if ascending else short


def _retain_slots(chosen: Tensor, rating: Tensor, k: int) -> Tensor:
    del k
    return _in_sequence(_ranked(chosen, rating, -1, descending=True, in_order=False), chosen)


def _in_sequence(shortfall: Tensor, chosen: Tensor) -> Tensor:
    """Of tokens that are to be in the order of the model's own, another order is no choice."""
    return shortfall.masked_fill((chosen.diff(dim=-1) < 0).any(), torch.inf)


def _compared(chosen: Tensor, x: Tensor, other: Any) -> Tensor:
    """Two numbers whose order matters are as far from a tie as they are from each other."""
    apart: Tensor = (x - other).abs()
    return apart.expand(chosen.shape)


def _one_by_one(reference: Callable[..., Tensor], pick: Pick) -> Shortfall:
    def shortfall(chosen: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _inside(chosen, args[1].shape[-1]) or _repeats(chosen, -1):
            return torch.tensor(torch.inf)
        follow = Following(chosen, pick)
        reference(*args, **kwargs, pick=follow)
        assert follow.shortfall is not None  # at least one is picked
        return follow.shortfall

    return shortfall


@dataclass(frozen=True)
class _Rule:
    """How a choice is judged, and which of the operation's results it is; None = it has one."""

    shortfall: Shortfall
    part: int | None = None


_COMPARISONS = (
    *(getattr(aten, name).Tensor for name in ("gt", "ge", "lt", "le")),
    *(getattr(aten, name).Scalar for name in ("gt", "ge", "lt", "le")),
)
_RULES: dict[Any, _Rule] = {
    aten.argmax.default: _Rule(_extreme(1.0)),
    aten.argmin.default: _Rule(_extreme(-1.0)),
    aten.max.dim: _Rule(_extreme(1.0), 1),
    aten.min.dim: _Rule(_extreme(-1.0), 1),
    aten.topk.default: _Rule(_topk, 1),
    aten.sort.default: _Rule(_sort, 1),
    aten.sort.stable: _Rule(_sort, 1),
    torch.ops.tokcc.topk_select.default: _Rule(_topk_select),
    torch.ops.tokcc.retain_slots.default: _Rule(_retain_slots),
    torch.ops.tokcc.greedy_select.default: _Rule(_one_by_one(greedy_select, largest)),
    torch.ops.tokcc.cover_select.default: _Rule(_one_by_one(cover_select, best)),
    torch.ops.tokcc.dpp_select.default: _Rule(_one_by_one(dpp_select, best)),
    **{target: _Rule(_compared) for target in _COMPARISONS},
}


def decisions(program: Program) -> list[Decision]:
    """Return the choices between real numbers in a program, in order."""
    found: list[Decision] = []
    near: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        own = _NEAR.get(value.dtype, 0.0) if isinstance(value, Tensor) else 0.0
        near[node] = max([own, *(near[source] for source in node.all_input_nodes)])
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not isinstance(node.args[0], fx.Node) or not is_float(node.args[0]):
            continue
        shown = node
        if rule.part is not None:
            part = rule.part
            shown = next((u for u in node.users if u.target is operator.getitem and u.args[1] == part), None)
        if shown is not None:
            found.append(Decision(node, shown, near[node.args[0]]))
    return found


def watching(program: Program, watched: Sequence[Decision]) -> Program:
    """Return the program with choices as further outputs."""
    return program.with_outputs({decision.output: decision.shown for decision in watched})


def replay(program: Program, watched: Sequence[Decision], feeds: Feeds, chosen: Mapping[str, Tensor]) -> Replayed:
    """Run a program with an engine's choices.

    Args:
        program: The reference.
        watched: Choices of it.
        feeds: Its inputs.
        chosen: The engine's choices by their outputs' names.
    """
    module = fx.GraphModule(torch.nn.Module(), program.graph)
    run = _Replay(module, {d.node: d for d in watched if d.output in chosen}, chosen)
    state = program.state_tensors()
    inputs = {node.name: feeds.get(program.public_name(node), node.meta.get("val")) for node in program.user_inputs}
    with torch.no_grad():
        results = run.run(*(state.get(name, inputs.get(name)) for name in program.placeholders))
    outputs = [results[i] for i in program.user_output_positions if isinstance(results[i], Tensor)]
    return Replayed(outputs, run.differing, run.elements, run.refused)


class _Replay(fx.Interpreter):
    """Runs the graph; where a choice is given, that is what the operation returns."""

    def __init__(
        self, module: fx.GraphModule, watched: Mapping[fx.Node, Decision], chosen: Mapping[str, Tensor]
    ) -> None:
        super().__init__(module)
        # A module may copy its graph; names stay.
        self.watched = {node.name: decision for node, decision in watched.items()}
        self.chosen = chosen
        self.differing = self.elements = 0
        self.refused: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        own = super().run_node(n)
        decision = self.watched.get(n.name)
        if decision is None:
            return own
        rule = _RULES[n.target]
        result = own if rule.part is None else own[rule.part]
        other = self.chosen[decision.output]
        self.elements += result.numel()
        if tuple(other.shape) != tuple(result.shape):
            self._refuse(decision, f"shape {tuple(other.shape)}, not {tuple(result.shape)}")
            return own
        differs = result != other
        count = int(differs.sum())
        if count == 0:
            return own
        self.differing += count
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        why = _unexplained(rule, args, kwargs, other, differs, decision.near)
        if why:
            self._refuse(decision, why)
            return own
        return self._forced(rule, args, kwargs, other)

    def _refuse(self, decision: Decision, why: str) -> None:
        self.refused = self.refused or f"{decision.node.name}: {why}"

    def _forced(self, rule: _Rule, args: Any, kwargs: Any, other: Tensor) -> Any:
        """Return the operation's result with the other choice: values go with their indices."""
        if rule.part is None:
            return other
        x = args[0]
        bound = inspect.signature(rule.shortfall).bind(other, *args, **kwargs)
        bound.apply_defaults()
        dim = bound.arguments["dim"]
        keepdim = other.ndim == x.ndim
        values = x.gather(dim, other if keepdim else other.unsqueeze(dim))
        return values if keepdim else values.squeeze(dim), other


def _unexplained(
    rule: _Rule, args: tuple[Any, ...], kwargs: Mapping[str, Any], other: Tensor, differs: Tensor, share: float
) -> str | None:
    """Say why a choice is not one that rounding explains, or None."""
    shortfall = rule.shortfall(other, *args, **kwargs).float()
    if rule.shortfall is _compared:
        # Elsewhere what was chosen as well falls short by nothing, and may stand in another place.
        shortfall = torch.where(differs, shortfall, 0.0)
    gap = _by_sample(shortfall, len(differs))
    near = share * _scale(args, len(differs))
    if bool((gap <= near).all()):
        return None
    worst = int((gap - near).argmax())
    return f"what was chosen is {float(gap[worst]):.3g} worse than the best, and rounding is {float(near[worst]):.3g}"


def _scale(args: tuple[Any, ...], samples: int) -> Tensor:
    """The largest number that a choice is made of, by sample: one sample's scores say nothing of another's."""
    scale = torch.zeros(samples)
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point():
            size = arg.abs().float()
            scale = torch.maximum(scale, _by_sample(size.masked_fill(size >= _OUT_OF_SIGHT, 0.0), samples))
    return scale


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """The largest element of each sample ``[B]``; of what has no samples, the largest."""
    if x.ndim and len(x) == samples and x.numel():
        return x.reshape(samples, -1).amax(1)
    return x.amax().expand(samples)


def _inside(chosen: Tensor, size: int) -> bool:
    return int(chosen.min()) >= 0 and int(chosen.max()) < size


def _repeats(chosen: Tensor, dim: int) -> bool:
    return bool((chosen.sort(dim).values.diff(dim=dim) == 0).any())
