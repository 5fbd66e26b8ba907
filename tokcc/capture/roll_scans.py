"""Scans over tokens, as a trace has them, become ``tokcc::recurrence`` and operations on all tokens.

A state-space model runs ``state = decay * state + update`` over its tokens. A trace holds that as torch's ``scan`` with
a graph inside, or as one copy of the loop's body for every token: neither says what becomes of it when there are fewer
tokens, and the second grows with them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import tokcc.kernels  # registers the operations
from tokcc.capture.each_step import EachStep, Steps
from tokcc.errors import CaptureError
from tokcc.ir.builder import same_size
from tokcc.ir.edit import fake_mode_of, remove_dead, replace
from tokcc.ir.program import PassResult, Program

__all__ = ["RollLoops", "RollScans"]

aten = torch.ops.aten
assert tokcc.kernels is not None
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}


def _terms(node: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each way to read a node as ``decay * state + update``: decay, state and update."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return
    for product, update in (node.args[:2], node.args[1::-1]):
        if isinstance(product, fx.Node) and product.target is aten.mul.Tensor:
            for decay, state in (product.args[:2], product.args[1::-1]):
                if isinstance(state, fx.Node):
                    yield decay, state, update


def _zeros(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target in {*_COPIES, aten.expand.default, aten._to_copy.default}:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    return node.target in _ZEROS or (
        node.target in (aten.full.default, aten.full_like.default) and node.args[1] in (0, 0.0)
    )


def _same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(same_size, one, other))


def _of_each(steps: Steps, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> EachStep | None:
    """Do at every step what a node does at one; None where that is not known to give the same."""
    made, one = steps.of(node.target, args, kwargs), node.meta["val"]
    if made is None or not isinstance(one, torch.Tensor):
        return None
    fake = made.node.meta["val"]
    return made if fake.dtype == one.dtype and _same_shape(fake.shape[1:], one.shape) else None


def _states(steps: Steps, decay: Any, update: Any, state: torch.Tensor) -> EachStep | None:
    """Emit a recurrence; None where nothing differs from step to step."""
    if not isinstance(update, EachStep):
        return None
    rank = state.ndim
    given: list[Any] = []
    for part in (decay, update):
        if not isinstance(part, EachStep | fx.Node):
            return None
        node = steps.wide(part, rank) if isinstance(part, EachStep) else part
        if node.meta["val"].dtype != state.dtype:  # a state of more digits than what is added to it
            node = steps.call(aten._to_copy.default, node, dtype=state.dtype)
        given.append(node)
    (decay, update) = given
    if not _same_shape(update.meta["val"].shape[1:], state.shape):
        return None
    if not _same_shape(decay.meta["val"].shape, update.meta["val"].shape):
        decay = steps.call(aten.mul.Tensor, decay, steps.call(aten.ones_like.default, update))
    return EachStep(steps.call(torch.ops.tokcc.recurrence.default, decay, update, 0))


@dataclass(frozen=True)
class RollScans:
    """Take torch's ``scan`` apart: what the state needs before it, the recurrence, and what is read from the states."""

    def run(self, program: Program) -> PassResult:
        """Apply the pass.

        Raises:
            CaptureError: When a scan is another one than a linear recurrence from zeros.
        """
        scans = [n for n in program.graph.nodes if getattr(n.target, "_name", None) == "scan" and n.op != "get_attr"]
        for node in scans:
            self._roll(program, node)
        if scans:
            remove_dead(program.graph)
            for node in list(program.graph.nodes):
                if node.op == "get_attr" and not node.users:
                    program.graph.erase_node(node)
        return PassResult(program.refreshed() if scans else program, bool(scans))

    def _roll(self, program: Program, node: fx.Node) -> None:
        taken: Any = node.args[:4]
        body_node, first, over, fixed = taken
        owner: Any = program.graph.owning_module
        body = getattr(owner, body_node.target)
        given: list[Any] = [*first, *over, *fixed]
        if len(first) != 1 or not _zeros(first[0]):
            self._refuse(node, "one state that starts from zeros")
        steps = Steps(program.graph, node, fake_mode_of(program))
        env: dict[fx.Node, Any] = {}
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        for i, (place, value) in enumerate(zip(places, given, strict=True)):
            if i:
                env[place] = EachStep(value) if i <= len(over) else value
        results: Any = body.graph.output_node().args[0]
        after = results[0]
        while after.target in _COPIES:
            after = after.args[0]
        for inner in body.graph.nodes:
            if inner.op != "call_function":
                continue
            if inner is after:
                env[inner] = self._state(node, steps, inner, places[0], env)
            elif all(n in env for n in inner.all_input_nodes):
                operands, named = fx.node.map_arg((inner.args, inner.kwargs), env.__getitem__)
                if not _differs(operands):  # the same in each step
                    env[inner] = steps.call(inner.target, *operands, **named)
                    continue
                made = _of_each(steps, inner, operands, named)
                if made is None:
                    self._refuse(node, f"operations that work on all tokens at once, found {inner.target}")
                env[inner] = made
        for user in list(node.users):
            number: Any = user.args[1]
            found = env.get(results[number])
            if not isinstance(found, EachStep):
                self._refuse(node, "results that are read from the new state")
            replace(user, found.node if number else steps.call(aten.select.int, found.node, 0, -1))
        program.graph.erase_node(node)

    def _state(self, node: fx.Node, steps: Steps, inner: fx.Node, state: fx.Node, env: dict[fx.Node, Any]) -> EachStep:
        for decay, before, update in _terms(inner):
            known = all(not isinstance(part, fx.Node) or part in env for part in (decay, update))
            if before is state and known:
                made = _states(steps, *fx.node.map_arg((decay, update), env.__getitem__), inner.meta["val"])
                if made is not None:
                    return made
        self._refuse(node, "a state that is `decay * state + update`")

    def _refuse(self, node: fx.Node, needed: str) -> NoReturn:
        raise CaptureError(
            "a scan of this model is not a linear recurrence",
            node=f"{node.name} [{node.target}]",
            needed=needed,
            help="write the recurrence as `state = decay * state + update`, with everything else outside of the scan",
        )


def _holds_nodes(values: Any) -> bool:
    return any(isinstance(item, fx.Node) for value in values for item in value)


def _differs(tree: Any) -> bool:
    if isinstance(tree, list | tuple):
        return any(_differs(item) for item in tree)
    return isinstance(tree, EachStep)


@dataclass
class _Loop:
    """The copies of a loop's body.

    Attributes:
        steps: Emits.
        count: Number of copies.
        places: Which copy made a state.
        states: All of them.
    """

    steps: Steps
    count: int
    places: dict[fx.Node, int]
    states: EachStep | None = None
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def one(self, values: Sequence[Any]) -> Any:
        """Return what stands for the values of all steps, one per step, or None where they are not alike."""
        first = values[0]
        if all(v is first for v in values):
            return first
        if all(isinstance(v, list | tuple) and len(v) == len(first) for v in values) and _holds_nodes(values):
            items = [self.one([v[i] for v in values]) for i in range(len(first))]
            return None if any(item is None for item in items) else items
        if not all(isinstance(v, fx.Node) for v in values):
            return first if all(type(v) is type(first) and v == first for v in values) else None
        key = tuple(id(v) for v in values)
        if key not in self.known:
            self.known[key] = self._one(values)
        return self.known[key]

    def _one(self, values: Sequence[fx.Node]) -> Any:
        if self.states is not None and all(self.places.get(v) == i for i, v in enumerate(values)):
            return self.states
        first = values[0]
        if any(v.op != "call_function" or v.target is not first.target or v.kwargs != first.kwargs for v in values):
            return None
        taken = self._taken(values)
        if taken is not None:
            return taken
        if any(len(v.args) != len(first.args) for v in values) or first.target is operator.getitem:
            return None
        args = [self.one([v.args[i] for v in values]) for i in range(len(first.args))]
        if any(a is None and given is not None for a, given in zip(args, first.args, strict=True)):
            return None
        if not _differs(args):
            return first  # computed anew in each step, and the same
        return _of_each(self.steps, first, args, dict(first.kwargs))

    def _taken(self, values: Sequence[fx.Node]) -> EachStep | None:
        """The tokens of one value, in order or from behind."""
        first = values[0]
        if first.target is not aten.select.int or any(v.args[:2] != first.args[:2] for v in values):
            return None
        source: Any = first.args[0]
        axis: Any = first.args[1]
        if not same_size(source.meta["val"].shape[axis], self.count):
            return None
        given: list[Any] = [v.args[2] for v in values]
        if not all(isinstance(i, int) for i in given):
            return None
        order = [i % self.count for i in given]
        if order == list(range(self.count)):
            return EachStep(self.steps.in_front(source, axis))
        if order == list(range(self.count))[::-1]:
            return EachStep(self.steps.in_front(self.steps.call(aten.flip.default, source, [axis]), axis))
        return None


@dataclass(frozen=True)
class RollLoops:
    """Find recurrences that were unrolled, one copy of the loop's body for every token, and roll them up."""

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        chains = list(_chains(program.graph))
        if not chains:
            return PassResult(program, False)
        mode = fake_mode_of(program)
        changed = False
        for chain in chains:
            changed |= self._roll(program.graph, chain, mode)
        changed |= remove_dead(program.graph)
        return PassResult(program.refreshed(), changed)

    def _roll(self, graph: fx.Graph, chain: list[tuple[fx.Node, Any, Any]], mode: FakeTensorMode) -> bool:
        nodes = [node for node, _, _ in chain]
        loop = _Loop(Steps(graph, nodes[0], mode), len(nodes), {node: i for i, node in enumerate(nodes)})
        decay, update = (loop.one([link[i] for link in chain]) for i in (1, 2))
        if decay is None or update is None:
            return False
        states = _states(loop.steps, decay, update, nodes[0].meta["val"])
        if states is None:
            return False
        loop.states = states
        for node in list(graph.nodes):
            parts: Any = node.args[0] if node.target is aten.stack.default else ()
            if len(parts) == len(nodes) and all(isinstance(p, fx.Node) for p in parts):
                loop.steps = Steps(graph, node, mode)
                whole = loop.one(parts)
                if isinstance(whole, EachStep):
                    replace(node, loop.steps.put_back(whole, node.args[1] if len(node.args) > 1 else 0))
        # What else reads a state, such as a cache that keeps the last one; where nobody does, this is dead.
        for i, node in enumerate(nodes):
            behind = Steps(graph, states.node.next, mode)
            node.replace_all_uses_with(behind.call(aten.select.int, states.node, 0, i))
        return True


def _chains(graph: fx.Graph) -> Iterator[list[tuple[fx.Node, Any, Any]]]:
    """Yield (state, decay, update) of every step of each chain of states that starts from zeros."""
    following: dict[fx.Node, list[tuple[fx.Node, Any, Any]]] = {}
    starts: list[tuple[fx.Node, Any, Any]] = []
    for node in graph.nodes:
        for decay, state, update in _terms(node):
            if _zeros(state):
                starts.append((node, decay, update))
            else:
                following.setdefault(state, []).append((node, decay, update))
    for start in starts:
        chain = [start]
        while len(following.get(chain[-1][0], ())) == 1:
            chain += following[chain[-1][0]]
        if len(chain) > 1:
            yield chain
