"""One step of a loop over tokens, done for all tokens at once: operations with the steps as one more axis in front."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tokcc.ir.edit import insert_call

__all__ = ["EachStep", "Steps"]

aten = torch.ops.aten


@dataclass(frozen=True)
class EachStep:
    """A value that differs from step to step.

    Attributes:
        node: ``[T, ...]``: what it is at each step.
    """

    node: fx.Node

    @property
    def rank(self) -> int:
        """Number of axes at one step."""
        return int(self.node.meta["val"].ndim) - 1


_POINTWISE = {aten.silu.default, aten.gelu.default, aten.softplus.default, aten._to_copy.default, aten.clone.default}
_OVER_AXES = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}
_AT_AXIS = {aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.softmax.int}
_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}


class Steps:
    """Emits operations for all steps, in front of a node.

    Args:
        graph: The graph.
        before: Where.
        mode: Of the fakes.
    """

    def __init__(self, graph: fx.Graph, before: fx.Node, mode: FakeTensorMode) -> None:
        self._graph, self._before, self._mode = graph, before, mode

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit an operation as it is."""
        return insert_call(self._graph, self._before, self._mode, target, *args, **kwargs)

    def in_front(self, source: fx.Node, axis: int) -> fx.Node:
        """Bring an axis to the front."""
        rank = source.meta["val"].ndim
        axis %= rank
        if axis == 0:
            return source
        return self.call(aten.permute.default, source, [axis, *(i for i in range(rank) if i != axis)])

    def put_back(self, value: EachStep, axis: int) -> fx.Node:
        """Bring the steps to an axis of the result."""
        rank = value.rank + 1
        axis %= rank
        if axis == 0:
            return value.node
        order = [*range(1, rank)]
        return self.call(aten.permute.default, value.node, [*order[:axis], 0, *order[axis:]])

    def wide(self, value: EachStep, rank: int) -> fx.Node:
        """Give a value leading axes of size one, as broadcasting at one step would."""
        node = value.node
        for _ in range(rank - value.rank):
            node = self.call(aten.unsqueeze.default, node, 1)
        return node

    def of(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Do an operation at every step.

        Args:
            target: The operation.
            args: Its arguments: :class:`EachStep` where they differ, nodes and numbers where they do not.
            kwargs: The same by name.

        Returns:
            What it gives at each step, or None where it is not known how to do it for all of them.
        """
        if any(isinstance(a, EachStep) for a in kwargs.values()) or not args:
            return None
        if torch.Tag.pointwise in getattr(target, "tags", ()) or target in _POINTWISE:
            return self._pointwise(target, args, kwargs)
        if target in (aten.matmul.default, aten.bmm.default):
            return self._product(args)
        if target is aten.einsum.default:
            return self._einsum(args)
        first, rest = args[0], list(args[1:])
        if not isinstance(first, EachStep) or any(isinstance(a, EachStep) for a in rest):
            return None
        if target in _OVER_AXES and not (rest and rest[0]):
            return None  # over all axes
        known = self._of_one(target, first, rest)
        return None if known is None else EachStep(self.call(target, first.node, *known, **kwargs))

    def _pointwise(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> EachStep:
        ranks = [a.rank if isinstance(a, EachStep) else a.meta["val"].ndim for a in args if _tensor(a)]
        given = [self.wide(a, max(ranks)) if isinstance(a, EachStep) else a for a in args]
        return EachStep(self.call(target, *given, **kwargs))

    def _product(self, args: Sequence[Any]) -> EachStep | None:
        ranks = [a.rank if isinstance(a, EachStep) else a.meta["val"].ndim for a in args]
        if min(ranks) < 2:
            return None
        given = [self.wide(a, max(ranks)) if isinstance(a, EachStep) else a for a in args]
        return EachStep(self.call(aten.matmul.default, *given))

    def _einsum(self, args: Sequence[Any]) -> EachStep | None:
        equation, operands = args[:2]
        steps = next(letter for letter in string.ascii_letters if letter not in equation)
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        if not arrow or "." in equation or len(args) > 2:
            return None
        labels = [
            steps + own if isinstance(operand, EachStep) else own
            for own, operand in zip(inputs.split(","), operands, strict=True)
        ]
        given = [operand.node if isinstance(operand, EachStep) else operand for operand in operands]
        return EachStep(self.call(aten.einsum.default, f"{','.join(labels)}->{steps}{output}", given))

    def _of_one(self, target: Any, x: EachStep, rest: list[Any]) -> list[Any] | None:
        """Return the other arguments of an operation on one value, with its axes counted behind the steps."""

        def axis(given: int, rank: int = x.rank) -> int:
            return given % rank + 1

        forms: dict[Any, Callable[[], list[Any]]] = {
            aten.unsqueeze.default: lambda: [axis(rest[0], x.rank + 1)],
            aten.transpose.int: lambda: [axis(rest[0]), axis(rest[1])],
            aten.permute.default: lambda: [[0, *(axis(d) for d in rest[0])]],
            aten.linear.default: lambda: rest,
            **dict.fromkeys(_AT_AXIS, lambda: [axis(rest[0]), *rest[1:]]),
            **dict.fromkeys(_OVER_AXES, lambda: [[axis(d) for d in rest[0]], *rest[1:]]),
            **dict.fromkeys(_RESHAPES, lambda: [[self._count(x), *rest[0]]]),
        }
        if target is aten.expand.default and len(rest[0]) == x.rank:
            return [[-1, *rest[0]]]
        return forms[target]() if target in forms else None

    def _count(self, x: EachStep) -> Any:
        size = x.node.meta["val"].shape[0]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, x.node, 0)


def _tensor(value: Any) -> bool:
    return isinstance(value, EachStep) or (
        isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
    )
