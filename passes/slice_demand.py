"""Demand slicing: compute only the rows that reach an output. Lossless.

When only the class token's row of the last block is read, that block's query, projection and MLP run for that row
alone. A backward pass finds which rows of every (node, axis) are wanted; where a value that is wanted whole feeds a
computation that is wanted in part, a slice goes on that edge, and the forward axis rules carry the rows to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcc.analysis.sites import Sites
from tokcc.analysis.walk import Walk
from tokcc.errors import AxisError
from tokcc.ir.builder import GraphBuilder, same_size
from tokcc.ir.edit import fake_mode_of, remove_dead, replace
from tokcc.ir.program import PassResult, Program
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.outputs import OutputPlan
from tokcc.passes.propagate import finish, refuse_fixed_sizes

__all__ = ["SliceDemand"]

aten = torch.ops.aten
_LONGEST_SLICE = 8

Wanted = tuple[bool, ...]
"""For each axis: True when every position is wanted, False when only the rows are."""


@dataclass
class _Demand:
    """The backward pass."""

    program: Program
    starts: set[fx.Node]
    rows: tuple[int, ...]
    wanted: dict[fx.Node, Wanted] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    def run(self) -> None:
        nodes = list(self.program.graph.nodes)
        self.nodes = {node.name: node for node in nodes}
        for value in self.program.output_values:
            if isinstance(value, fx.Node):
                self._want(value, (True,) * _rank(value))
        for node in reversed(nodes):
            if node.op != "call_function" or (node not in self.wanted and _rank(node) >= 0):
                continue
            source = self.untouched(node)
            if source is not None:
                self._want(self.nodes[source], self.wanted[node])
                continue
            for operand in node.all_input_nodes:
                if _rank(operand) >= 0:
                    self._want(operand, self.of_edge(node, operand))

    def untouched(self, node: fx.Node) -> str | None:
        """Name of the stream before a reduction, when only tokens are wanted that the reduction does not touch."""
        mark = node.meta.get("tokcc_prefix")
        own = self.wanted.get(node)
        if mark is None or own is None or len(own) != 3 or own[1] or any(not 0 <= row < mark[1] for row in self.rows):
            return None
        return str(mark[0])

    def left_out(self) -> dict[fx.Node, str]:
        """Return the reductions that only untouched tokens survive, with the stream before each."""
        return {node: source for node in self.wanted if (source := self.untouched(node)) is not None}

    def _want(self, node: fx.Node, wanted: Wanted) -> None:
        known = self.wanted.get(node)
        self.wanted[node] = wanted if known is None else tuple(a or b for a, b in zip(known, wanted, strict=True))

    def of_edge(self, node: fx.Node, operand: fx.Node) -> Wanted:
        """Which axes of an operand a node wants whole."""
        everything = (True,) * _rank(operand)
        if node in self.starts and node.args[0] is operand:
            dim = _axis(node, 1, _rank(operand))
            own = self.wanted.get(node, ())
            behind = own[dim:] if node.target is aten.select.int else own[dim + 1 :]
            return (*own[:dim], False, *behind)
        known = self.wanted.get(node)
        if known is None or all(known):
            return everything
        return _through(node, operand, known) or everything


def _rank(node: Any) -> int:
    value = node.meta.get("val")
    return int(value.ndim) if isinstance(value, torch.Tensor) else -1


def _axis(node: fx.Node, position: int, rank: int) -> int:
    """Return an axis argument, counted from the front."""
    axis: Any = node.args[position]
    return int(axis) % rank


def _through(node: fx.Node, operand: fx.Node, own: Wanted) -> Wanted | None:
    """How the demand on a node's axes becomes the demand on an operand's; None for operations that mix rows."""
    target, rank, out = node.target, _rank(operand), len(own)
    if target in (aten.linear.default,):
        return (*own[:-1], True) if operand is node.args[0] else None
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        width = len(node.args[1])  # type: ignore[arg-type]  # a list
        return (*own[: out - width], *(True,) * width) if operand is node.args[0] else None
    if target in (aten.softmax.int, aten._softmax.default):
        dim = _axis(node, 1, out)
        return tuple(w or i == dim for i, w in enumerate(own))
    if target in (aten.matmul.default, aten.bmm.default):
        if operand is node.args[0] and operand is not node.args[1] and rank == out:
            return (*own[:-1], True)
        return None
    if target is aten.scaled_dot_product_attention.default:
        if operand is node.args[0] and operand not in node.args[1:]:
            return (*own[:-1], True)
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if operand is mask and rank >= 2:
            return (*(True,) * (rank - 2), own[-2], True)
        return None
    if target is torch.ops.tokcc.attention_probs.default:
        return (True, True, own[2], True) if operand is node.args[0] else None
    return _shape_through(node, operand, own)


def _shape_through(node: fx.Node, operand: fx.Node, own: Wanted) -> Wanted | None:
    target, rank, out = node.target, _rank(operand), len(own)
    if target is aten.permute.default:
        dims: Any = node.args[1]
        result = [True] * rank
        for outer, dim in enumerate(dims):
            result[dim % rank] = own[outer]
        return tuple(result)
    if target is aten.transpose.int:
        order = list(range(rank))
        first, second = (_axis(node, i, rank) for i in (1, 2))
        order[first], order[second] = order[second], order[first]
        result = [True] * rank
        for outer, dim in enumerate(order):
            result[dim] = own[outer]
        return tuple(result)
    if target is aten.unsqueeze.default:
        place = _axis(node, 1, out)
        return (*own[:place], *own[place + 1 :])
    if target is aten.reshape.default:
        return _reshape_through(node, operand, own)
    if target is aten.expand.default and rank == out:
        return own
    pointwise = torch.Tag.pointwise in getattr(target, "tags", ()) or target in (
        aten._to_copy.default,
        aten.gelu.default,
    )
    if pointwise and rank <= out:
        return own[out - rank :]
    return None


def _reshape_through(node: fx.Node, operand: fx.Node, own: Wanted) -> Wanted | None:
    """An axis passes a reshape when it keeps its size and what stands before it multiplies to the same."""
    source, result = operand.meta["val"].shape, node.meta["val"].shape
    wanted = [True] * len(source)
    for j, partial in enumerate(own):
        if partial:
            continue
        match = next(
            (
                i
                for i in range(len(source))
                if same_size(source[i], result[j]) and same_size(_count(source[:i]), _count(result[:j]))
            ),
            None,
        )
        if match is None:
            return None
        wanted[match] = False
    return tuple(wanted)


def _chosen(node: fx.Node) -> range:
    """Return the positions that a selection along its axis takes; negative ones are counted from a symbolic end."""
    operand: Any = node.args[0]
    size: Any = operand.meta["val"].shape[_axis(node, 1, _rank(operand))]
    given: list[Any] = list(node.args[2:])
    if node.target is aten.select.int:
        given = [given[0], given[0] + 1 if isinstance(given[0], int) else None]
    given += [0, torch.iinfo(torch.int64).max, 1][len(given) :]
    start, stop, step = given
    if not isinstance(start, int) or not isinstance(stop, int) or step != 1:
        return range(0)
    if start < 0:
        stop = 0 if stop > 0 else stop  # behind the last one
        if isinstance(size, int):
            start, stop = start + size, stop + size
    rows = range(start, stop)
    one_side = start >= 0 or stop <= 0
    return rows if len(rows) <= _LONGEST_SLICE and one_side else range(0)


def _count(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _without(program: Program, reductions: dict[fx.Node, str]) -> Program:
    """Return a copy in which nothing computes these reductions: their scores must not be rewritten for a few rows."""
    program = program.copied()
    nodes = {node.name: node for node in program.graph.nodes}
    for reduction, source in reductions.items():
        node = nodes[reduction.name]
        with program.graph.inserting_before(node):
            stands_in = program.graph.call_function(aten.clone.default, (nodes[source],))
        stands_in.meta = dict(node.meta)  # its value is taken from the stream before by `_Untouched`
        replace(node, stands_in)
    remove_dead(program.graph)
    return program


@dataclass(frozen=True)
class _Untouched:
    """Takes the stream before a reduction in place of its result, where only tokens are wanted that it leaves alone."""

    source: str
    narrow: Callable[[Walk, Value, int], Value]

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Return the wanted rows of the stream before."""
        del node, value
        before: Value = walk.env[walk.nodes[self.source]]
        return before if before.spaces else self.narrow(walk, before, 1)


@dataclass(frozen=True)
class SliceDemand:
    """Slice edges where only some rows are wanted, and propagate.

    Attributes:
        sites: Sites of the original program: which selections take tokens.
    """

    sites: Sites | None = None

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        demand = self._demand(program)
        if not demand.rows:
            return PassResult(program, False)
        left_out = demand.left_out()
        if left_out:
            demand = self._demand(_without(program, left_out))
        builder = GraphBuilder(fake_mode_of(demand.program))
        try:
            outputs = self._rebuild(builder, demand.program, demand, demand.rows)
        except AxisError as error:
            refuse_fixed_sizes(program, builder)
            # Slicing is an optimisation: where a rule does not carry rows, the program stays as it is, and says so.
            return PassResult(program.noting(f"demand slicing was not applied: {error.what} ({error.node})"), False)
        if outputs is None:
            return PassResult(program, False)
        return PassResult(finish(demand.program, builder, outputs), True)

    def _demand(self, program: Program) -> _Demand:
        demand = _Demand(program, *self._selections(program))
        demand.run()
        return demand

    def _selections(self, program: Program) -> tuple[set[fx.Node], tuple[int, ...]]:
        """Find selections of fixed token positions, and the union of their rows."""
        starts: set[fx.Node] = set()
        rows: set[int] = set()
        for node in program.graph.nodes:
            if node.op != "call_function" or not self._takes_tokens(node):
                continue
            chosen = _chosen(node)
            if chosen:
                starts.add(node)
                rows.update(chosen)
        # Rows counted from the end come behind those counted from the front, as far as one can know.
        return starts, tuple(sorted(rows, key=lambda row: (row < 0, row)))

    def _takes_tokens(self, node: fx.Node) -> bool:
        if self.sites is None or node.target not in (aten.select.int, aten.slice.Tensor):
            return False
        if node.meta.get("tokcc"):
            return False
        operand: Any = node.args[0]
        source = self.sites.axes.get(operand.meta.get("origin", operand.name))
        if source is None or source.rank != _rank(operand):
            return False
        dim = _axis(node, 1, source.rank)
        return any(f.space is not None and not f.space.is_batch for f in source.axes[dim])

    def _rebuild(
        self, builder: GraphBuilder, program: Program, demand: _Demand, rows: tuple[int, ...]
    ) -> OutputPlan | None:
        """Rebuild the program with slices; None when there is nothing to slice."""
        spaces: dict[str, TokenSpace] = {}
        changed = False

        def narrow(walk: Walk, value: Value, axis: int) -> Value:
            nonlocal changed
            size = value.old[axis]
            key = str(size)
            if key not in spaces:
                root = TokenSpace(f"rows of {size}", builder.size(value.handle, axis), size)
                spaces[key] = TokenSpace("rows", len(rows), size, parent=root, rows=rows)
            child = spaces[key]
            changed = True
            axes = list(value.axes)
            axes[axis] = (Factor(child.parent, size),)
            tagged = value.having(axes=tuple(axes))
            return walk.ctx.remap(tagged, axis, 0, child, None)

        def on_operand(walk: Walk, node: fx.Node, operand: fx.Node, value: Value) -> Value:
            asked = demand.of_edge(node, operand)
            whole = demand.wanted.get(operand, ())
            if node in demand.starts or all(asked) or len(whole) != value.rank:
                return value
            for axis, wanted in enumerate(asked):
                one = isinstance(value.old[axis], int) and value.old[axis] == 1
                if not wanted and whole[axis] and not one and not value.spaces and _fit(rows, value.old[axis]):
                    value = narrow(walk, value, axis)
            return value

        actions = {node.name: (_Untouched(source, narrow),) for node, source in demand.left_out().items()}
        walk = Walk(program, builder, None, on_operand=on_operand, actions=actions)
        values = walk.run()
        if not changed:
            return None
        for value in values:
            if isinstance(value, Value) and value.reduced:
                walk.ctx.fail("an output would lose rows")
        return OutputPlan(program.output_names, ("full",) * len(program.output_names), None, tuple(values))


def _fit(rows: Sequence[int], size: Any) -> bool:
    """A row list must fit; symbolic sizes are at least as long as their rows by the model's own selection."""
    return not isinstance(size, int) or all(0 <= row < size for row in rows)
