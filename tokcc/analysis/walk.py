"""The forward walk: rebuild a program node by node, with typed axes.

The same walk serves annotation (no reduction: derive every axis), propagation (reductions at the cuts, everything
downstream rewritten) and the eager reference (the rules just call). Old nodes are never changed, so their shapes stay
available as "the shape in the unreduced graph".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx

import tokcc.kernels  # registers the operations
from tokcc.analysis.context import Context
from tokcc.analysis.recount import recount
from tokcc.analysis.restoring import restore
from tokcc.analysis.rules import Rule, rule_for
from tokcc.analysis.rules.totals import carries_totals
from tokcc.analysis.stream_nodes import StreamNodes
from tokcc.errors import AxisError, VerifyError
from tokcc.ir.builder import Builder, GraphBuilder
from tokcc.ir.program import Program
from tokcc.ir.space import Axis, Factor, TokenSpace
from tokcc.ir.value import Value, untagged

__all__ = ["Action", "Entry", "Walk"]

aten = torch.ops.aten
assert tokcc.kernels is not None


@dataclass(frozen=True)
class Entry:
    """Where the residual stream begins.

    Attributes:
        node: Name of the first stream node, ``[B, N, C]`` or ``[N, B, C]``.
        token_axis: Its token axis.
        batch_axis: Its batch axis.
    """

    node: str
    token_axis: int = 1
    batch_axis: int = 0


class Action(Protocol):
    """Something to do to a value at a cut."""

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Return what takes the value's place for every later use."""
        ...


class Walk:
    """One forward walk.

    Args:
        program: The program to read; it is not changed.
        builder: Where to emit.
        entry: Where the token space starts, or None to copy.
        actions: What to do at which old node.
        inputs: For the eager builder: values of all placeholders by name.
        on_operand: Called for every tensor that a node reads, with the walk, the node and the operand's old node;
            returns what the node reads in its place.
    """

    def __init__(
        self,
        program: Program,
        builder: Builder,
        entry: Entry | None,
        *,
        actions: Mapping[str, Sequence[Action]] | None = None,
        inputs: Mapping[str, Any] | None = None,
        on_operand: Callable[[Walk, fx.Node, fx.Node, Value], Value] | None = None,
    ) -> None:
        self.program = program
        self.builder = builder
        self.entry = entry
        self.actions = dict(actions or {})
        self.env: dict[fx.Node, Any] = {}
        self.lost: dict[str, AxisError] = {}
        self.batch: TokenSpace | None = None
        self.tokens: TokenSpace | None = None
        self.nodes = {node.name: node for node in program.graph.nodes}
        cuts = [self.nodes[name] for name in self.actions]
        self.stream = StreamNodes(None if entry is None else self.nodes[entry.node], cuts)
        self.notes: dict[Any, Any] = {}
        """What actions tell later ones."""
        self._inputs = dict(inputs or {})
        self._on_operand = on_operand
        self._rehearsing = False
        self._bindings: dict[Any, int] = {}
        self.ctx = Context(builder=builder, recompute=partial(recount, self), old_size=self.old_size)

    # shapes of the unreduced graph ------------------------------------------------------------------------------------

    def old_shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return a node's shape in the unreduced graph: ints, and ``SymInt`` when building a graph."""
        value = node.meta["val"]
        return tuple(self.old_size(size) for size in value.shape)

    def old_size(self, size: Any) -> Any:
        """Return one old size; with the eager builder symbols take the values of the inputs in use."""
        if isinstance(size, int) or isinstance(self.builder, GraphBuilder):
            return size
        expression = size.node.expr.xreplace(self._bindings)
        return int(expression)

    def _bind(self, node: fx.Node, real: Any) -> None:
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor) or not isinstance(real, torch.Tensor):
            return
        sizes: Iterable[Any] = fake.shape
        for symbolic, size in zip(sizes, real.shape, strict=True):
            if not isinstance(symbolic, int) and symbolic.node.expr.is_symbol:
                self._bindings[symbolic.node.expr] = int(size)

    # the walk ---------------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Walk the whole graph.

        Returns:
            The values that leave the graph (values, or plain handles), in order.

        Raises:
            AxisError: When a node uses a reduced axis in a way that has no rule.
        """
        result: Any = None
        for node in self.program.graph.nodes:
            self.ctx.node = node
            if isinstance(self.builder, GraphBuilder):
                self.builder.scope = node
            if node.op == "placeholder":
                value = self._placeholder(node)
                self.env[node] = self._after(node, value) if isinstance(value, Value) else value
            elif node.op == "call_function":
                value = self._call(node)
                self.env[node] = self._after(node, value)
            elif node.op == "output":
                result = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[0]]
            else:
                self.ctx.fail(f"a graph node of kind {node.op}")
        return result

    def rehearse(self, node: fx.Node, value: Value, wanted: fx.Node) -> Any:
        """Return what a later node would be if ``node`` were ``value``; the walk goes on as if nothing had been run.

        Args:
            node: The node in work.
            value: What it is to be.
            wanted: A node behind it.
        """
        needed, front = set[fx.Node](), [wanted]
        while front:
            current = front.pop()
            if current not in needed and current is not node and current not in self.env:
                needed.add(current)
                front += self._reads(current)
        env, own = dict(self.env), self.ctx.node
        self.env[node] = value
        self._rehearsing = True
        try:
            for later in self.program.graph.nodes:
                if later in needed:
                    self.ctx.node = later
                    self.env[later] = self._rehearsed(later)
            return self.env[wanted]
        finally:
            self.env, self.ctx.node, self._rehearsing = env, own, False

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node reads when it is rehearsed."""
        return node.all_input_nodes

    def _rehearsed(self, node: fx.Node) -> Any:
        """Emit a node that is rehearsed."""
        return self._call(node)

    def _placeholder(self, node: fx.Node) -> Any:
        if isinstance(self.builder, GraphBuilder):
            handle: Any = self.builder.placeholder(node)
        else:
            handle = self._inputs[node.name]
            self._bind(node, handle)
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return handle
        return untagged(handle, self.old_shape(node))

    def _after(self, node: fx.Node, value: Any) -> Any:
        if self.entry is not None and node.name == self.entry.node and self.tokens is None:
            value = self._enter(value)
        self.stream.follow(node)
        for action in self.actions.get(node.name, ()):
            value = action.apply(self, node, value)
        return value

    def _enter(self, value: Value) -> Value:
        assert self.entry is not None
        batch, token = self.entry.batch_axis, self.entry.token_axis
        self.batch = TokenSpace("batch", self.builder.size(value.handle, batch), value.old[batch], is_batch=True)
        self.tokens = TokenSpace("tokens", self.builder.size(value.handle, token), value.old[token])
        axes = list(value.axes)
        axes[batch] = (Factor(self.batch, value.old[batch]),)
        axes[token] = (Factor(self.tokens, value.old[token]),)
        return value.having(axes=tuple(axes), side=False)

    def _call(self, node: fx.Node) -> Any:
        given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: self._operand(node, n))
        args, kwargs = given
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if node.target is aten.sym_size.int and isinstance(args[0], Value):
            return self._old_axis_size(node, args[0], args[1])
        tensors = [v for v in _leaves((args, kwargs)) if isinstance(v, Value)]
        plain_args, plain_kwargs = _unwrap(args), _unwrap(kwargs)
        self.ctx.original = (plain_args, plain_kwargs)
        self.ctx.clean = not any(v.reduced for v in tensors)
        if not any(v.tagged or v.totals for v in tensors):
            return self._copy(node)
        if any(v.totals for v in tensors) and not carries_totals(node.target):
            self.ctx.fail(
                "a sum over the token axis is used as it is, but dropped tokens are missing from it",
                needed="a mean, or a division by a count of the same tokens",
            )
        rule = rule_for(node.target)
        if rule is None:
            if self.ctx.clean:
                self.lost[node.name] = AxisError("no axis rule for this operation", node=self.ctx.describe())
                return self._copy(node)
            return self._with_restore(node, None, args, kwargs)
        if not self.ctx.clean:
            return self._with_restore(node, rule, args, kwargs)
        return self._annotated(node, rule, args, kwargs)

    def _annotated(self, node: fx.Node, rule: Rule, args: Any, kwargs: Any) -> Any:
        """Apply a rule where nothing is reduced: what it refuses is copied, and its axes are lost."""
        try:
            return self._ruled(node, rule, args, kwargs)
        except AxisError as error:
            self.lost[node.name] = error
            return self._copy(node)

    def _ruled(self, node: fx.Node, rule: Rule, args: Any, kwargs: Any) -> Any:
        """Apply a rule and check what it promises: shapes alone do not prove a rule, but a wrong one stops here."""
        result = rule(self.ctx, *args, **kwargs)
        for value in result if isinstance(result, tuple) else (result,):
            shape = self.builder.shape(value.handle)
            if len(shape) != len(value.axes) or len(shape) != len(value.old):
                raise VerifyError(
                    "an axis rule lost an axis",
                    node=self.ctx.describe(),
                    needed=f"{len(shape)} axes",
                    found=f"{len(value.axes)} axes, {len(value.old)} old sizes",
                )
            for place, (size, axis) in enumerate(zip(shape, value.axes, strict=True)):
                wanted = _known_size(axis)
                if isinstance(size, int) and wanted is not None and size != wanted:
                    raise VerifyError(
                        f"an axis rule made axis {place} another size than its tokens say",
                        node=self.ctx.describe(),
                        needed=str(wanted),
                        found=str(size),
                    )
        return result

    def _operand(self, node: fx.Node, operand: fx.Node) -> Any:
        value = self.env[operand]
        if self._on_operand is not None and isinstance(value, Value):
            return self._on_operand(self, node, operand, value)
        return value

    def _with_restore(self, node: fx.Node, rule: Rule | None, args: Any, kwargs: Any) -> Any:
        """Run a rule; where it refuses, give the tokens back first if every step involved allows that."""
        try:
            if rule is None:
                self.ctx.fail("no axis rule for this operation")
            return self._ruled(node, rule, args, kwargs)
        except AxisError as error:
            values = [v for v in _leaves((args, kwargs)) if isinstance(v, Value) and v.reduced]
            spaces = {s for v in values for s in v.spaces if s.reduced}
            if any(v.totals for v in values) or not spaces or any(s.restore == "none" for s in _steps(spaces)):
                raise error from None

        def given_back(value: Any) -> Any:
            if not isinstance(value, Value) or not value.reduced:
                return value
            return self.restored(value)

        restored_args, restored_kwargs = _map((args, kwargs), given_back)
        self.ctx.original = (_unwrap(restored_args), _unwrap(restored_kwargs))
        self.ctx.clean = True
        if rule is None:
            return self._copy(node)
        return self._annotated(node, rule, restored_args, restored_kwargs)

    def restored(self, value: Value) -> Value:
        """Give every reduced token axis of a value back to the root space."""
        # A value that is not recorded yet is the one that the node in work has just made.
        node = next((n for n, known in self.env.items() if known is value), self.ctx.node)
        for axis, factors in enumerate(value.axes):
            reduced = [f for f in factors if f.space is not None and not f.space.is_batch and f.space.reduced]
            if not reduced:
                continue
            if len(factors) > 1:
                self.ctx.fail("tokens cannot be given back to an axis that is fused with another one")
            value = restore(self.ctx, value, axis, partial(self.stream.before, self, node))
        return value

    def _copy(self, node: fx.Node) -> Any:
        """Copy a node whose operands carry no reduced space; its result has no axes until it meets the stream."""
        args, kwargs = self.ctx.original
        handle = self.builder.call(node.target, *args, like=self._pattern(node), **kwargs)
        fake = node.meta.get("val")
        read = [self.env[operand] for operand in node.all_input_nodes]
        side = all(value.side for value in _leaves(read) if isinstance(value, Value))
        if isinstance(fake, torch.Tensor):
            return untagged(handle, self.old_shape(node)).having(side=side)
        if isinstance(fake, list | tuple) and node.target is not operator.getitem:
            return tuple(
                untagged(self.builder.call(operator.getitem, handle, i), self.ctx.old_sizes(item)).having(side=side)
                if isinstance(item, torch.Tensor)
                else item
                for i, item in enumerate(fake)
            )
        return handle

    def _pattern(self, node: fx.Node) -> fx.Node | None:
        """Return the node whose name and fake a copy of it takes, or None where it is a node of its own."""
        return None if self._rehearsing else node

    def _old_axis_size(self, node: fx.Node, value: Value, axis: int) -> Any:
        """The size that the unreduced graph saw: rules rebuild shapes from factors and never read it for tokens."""
        if not any(f.space is not None and f.space.reduced for f in value.axes[axis % value.rank]):
            return self.builder.call(aten.sym_size.int, value.handle, axis, like=self._pattern(node))
        size: Any = 1
        for factor in value.axes[axis % value.rank]:
            own = factor.space.root.size if factor.space is not None else self.ctx.factor_size(factor)
            size = self.builder.mul_sizes(size, own)
        return size


def _known_size(axis: Axis) -> int | None:
    """Return the current size of an axis, or None where it is symbolic."""
    size = 1
    for factor in axis:
        own = factor.old if factor.space is None else factor.space.size
        if not isinstance(own, int):
            return None
        size *= own
    return size


def _steps(spaces: set[TokenSpace]) -> list[TokenSpace]:
    return [s for space in spaces for s in space.chain[1:]]


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _leaves(item)]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _leaves(item)]
    return [tree]


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_map(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: _map(item, function) for key, item in tree.items()}
    return function(tree)


def _unwrap(tree: Any) -> Any:
    """Replace values by handles; lists that fx made immutable become plain lists."""
    if isinstance(tree, Value):
        return tree.handle
    if isinstance(tree, tuple):
        return tuple(_unwrap(item) for item in tree)
    if isinstance(tree, list):
        return [_unwrap(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _unwrap(item) for key, item in tree.items()}
    return tree


def eager_inputs(program: Program, feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the values of all placeholders for an eager walk: state from the program, user inputs from ``feeds``."""
    values: dict[str, Any] = dict(program.state_tensors())
    for node in program.user_inputs:
        values[node.name] = feeds[node.name]
    return values
