"""Drop attention masks that mask nothing, and keep the others as small as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import same_size
from tokcc.ir.edit import fake_mode_of, insert_call, remove_dead
from tokcc.ir.program import PassResult, Program

__all__ = ["NarrowMasks"]

aten = torch.ops.aten

_SHAPE_ONLY = {
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
}
_AND = {aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor}
_WHERES = {aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar}
_FULL = {aten.full.default, aten.new_full.default, aten.full_like.default}
_ONES = {aten.ones.default, aten.new_ones.default, aten.ones_like.default}
_ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}


@dataclass
class _Facts:
    """What is known of every element of a tensor: all true, all zero, not negative, or position along one axis."""

    program: Program
    _known: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    _arange: dict[fx.Node, tuple[int, Any] | None] = field(default_factory=dict)
    _state: dict[str, torch.Tensor] | None = None

    def of(self, node: Any) -> frozenset[str]:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return frozenset()
        if node not in self._known:
            self._known[node] = frozenset(self._derive(node))
        return self._known[node]

    def _constant(self, node: fx.Node) -> set[str]:
        if self._state is None:
            self._state = self.program.state_tensors()
        value = self._state.get(node.name)
        if value is None or value.numel() > 2**26:
            return set()
        if value.dtype == torch.bool:
            return {"true"} if bool(value.all()) else {"zero"} if not bool(value.any()) else set()
        return {"zero"} if not bool(value.count_nonzero()) else set()

    def _derive(self, node: fx.Node) -> set[str]:
        target, args = node.target, node.args
        is_bool = node.meta["val"].dtype == torch.bool
        if node.op == "placeholder":
            return self._constant(node)
        if target in _SHAPE_ONLY:
            return set(self.of(args[0]))
        if target in _ONES:
            return {"true"} if is_bool else {"nonneg"}
        if target in _ZEROS:
            return {"zero"}
        if target in _FULL:
            value = args[2] if target is aten.new_full.default else args[1]
            return {"true"} if is_bool and value else {"zero"} if not value else set()
        if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            start = args[0] if target is not aten.arange.default else 0
            step = args[2] if len(args) > 2 else 1
            return {"nonneg"} if all(isinstance(n, int) and n >= 0 for n in (start, step)) else set()
        if target is aten.add.Tensor and "nonneg" in self.of(args[0]) and not node.kwargs:
            other = args[1]
            positive = isinstance(other, int | float) and other >= 0
            return {"nonneg"} if positive or "nonneg" in self.of(other) else set()
        if target is aten.ge.Scalar and "nonneg" in self.of(args[0]):
            return {"true"} if isinstance(args[1], int | float) and args[1] <= 0 else set()
        if target in _AND:
            return {"true"} if all("true" in self.of(a) for a in args[:2]) else set()
        if target in (aten.logical_not.default, aten.bitwise_not.default) and is_bool:
            known = self.of(args[0])
            return {"zero"} if "true" in known else {"true"} if "zero" in known else set()
        if target in _WHERES and "true" in self.of(args[0]):
            return {"zero"} if args[1] in (0, 0.0) else set(self.of(args[1]) & {"zero"})
        if target is aten.masked_fill.Scalar and "zero" in self.of(args[1]):
            return set(self.of(args[0]))
        if target is aten.mul.Tensor and any("zero" in self.of(a) for a in args[:2]):
            return {"zero"}
        return set()

    def arange(self, node: Any) -> tuple[int, Any] | None:
        """Return (axis, length) when a tensor is its own position along one axis."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._arange:
            self._arange[node] = self._find_arange(node)
        return self._arange[node]

    def _find_arange(self, node: fx.Node) -> tuple[int, Any] | None:
        value: Any = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        if node.target is aten.arange.default:
            return 0, value.shape[0]
        if node.target in (aten.arange.start, aten.arange.start_step):
            step = node.args[2] if len(node.args) > 2 else 1
            return (0, value.shape[0]) if node.args[0] == 0 and step == 1 else None
        if node.target is aten.add.Tensor and node.args[1] == 0:
            return self.arange(node.args[0])
        if node.target is aten.unsqueeze.default:
            inner = self.arange(node.args[0])
            dim: Any = node.args[1]
            return None if inner is None else (inner[0] + (1 if dim % value.ndim <= inner[0] else 0), inner[1])
        if node.op == "placeholder":
            if self._state is None:
                self._state = self.program.state_tensors()
            tensor = self._state.get(node.name)
            wide = [i for i, size in enumerate(value.shape) if not same_size(size, 1)]
            if tensor is None or tensor.dtype != torch.int64 or len(wide) != 1:
                return None
            same = torch.equal(tensor.reshape(-1), torch.arange(tensor.numel()))
            return (wide[0], tensor.numel()) if same else None
        return None


@dataclass(frozen=True)
class NarrowMasks:
    """Rewrite attention masks to the smallest tensor that broadcasts to them.

    All-true (or all-zero) masks are dropped, all-true operands of a conjunction too, final expands are left to the
    attention's own broadcasting, and look-ups by ``arange`` become plain views.
    """

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        graph = program.graph
        facts = _Facts(program)
        mode = fake_mode_of(program)
        changed = self._plain_lookups(program, facts)
        narrow: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if node.target is aten.scaled_dot_product_attention.default:
                changed |= self._attention(node, facts, narrow, mode)
            elif node.target is aten.add.Tensor and not node.kwargs.get("alpha"):
                changed |= self._addition(node, facts, narrow, mode)
        changed |= remove_dead(graph)
        return PassResult(program.refreshed(), changed)

    def _attention(self, node: fx.Node, facts: _Facts, narrow: dict[fx.Node, fx.Node], mode: Any) -> bool:
        kwarg = isinstance(node.kwargs.get("attn_mask"), fx.Node)
        mask = node.kwargs["attn_mask"] if kwarg else node.args[3] if len(node.args) > 3 else None
        if not isinstance(mask, fx.Node):
            return False
        is_bool = mask.meta["val"].dtype == torch.bool
        smaller: fx.Node | None = None
        if ("true" if is_bool else "zero") not in facts.of(mask):
            smaller = self._narrow(mask, facts, narrow, mode)
            if smaller.meta["val"].ndim < 2:
                # Attention wants a mask of at least two axes.
                smaller = insert_call(node.graph, node, mode, aten.unsqueeze.default, smaller, 0)
            if smaller is mask:
                return False
        if kwarg:
            node.kwargs = {**node.kwargs, "attn_mask": smaller}
        else:
            node.args = (*node.args[:3], smaller, *node.args[4:])
        return True

    def _addition(self, node: fx.Node, facts: _Facts, narrow: dict[fx.Node, fx.Node], mode: Any) -> bool:
        """``scores + mask`` of an attention written out: the other operand already has the full shape."""
        first, second = node.args[:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return False
        for mine, other in ((second, first), (first, second)):
            full = _equal_shapes(other, node)
            if not full:
                continue
            if "zero" in facts.of(mine) and _equal_dtypes(other, node):
                node.replace_all_uses_with(other)
                return True
            if mine.target is aten.expand.default or mine.target in _WHERES:
                smaller = self._narrow(mine, facts, narrow, mode)
                if smaller is not mine:
                    node.replace_input_with(mine, smaller)
                    return True
        return False

    def _narrow(self, node: fx.Node, facts: _Facts, memo: dict[fx.Node, fx.Node], mode: Any) -> fx.Node:
        """Return a node that broadcasts to the given one."""
        if node not in memo:
            memo[node] = self._narrower(node, facts, memo, mode)
        return memo[node]

    def _narrower(self, node: fx.Node, facts: _Facts, memo: dict[fx.Node, fx.Node], mode: Any) -> fx.Node:
        args = node.args
        if node.target is aten.expand.default:
            assert isinstance(args[0], fx.Node)
            return self._narrow(args[0], facts, memo, mode)
        if node.target in _AND and isinstance(args[0], fx.Node) and isinstance(args[1], fx.Node):
            for mine, other in ((args[0], args[1]), (args[1], args[0])):
                if "true" in facts.of(mine):
                    return self._narrow(other, facts, memo, mode)
            return self._rebuilt(node, [0, 1], facts, memo, mode)
        if node.target in _WHERES:
            nodes = [i for i in range(3) if isinstance(args[i], fx.Node)]
            # Scalars and single elements broadcast; a full-size branch keeps its shape by itself.
            return self._rebuilt(node, nodes, facts, memo, mode)
        if node.target in (aten._to_copy.default, aten.logical_not.default, aten.bitwise_not.default):
            return self._rebuilt(node, [0], facts, memo, mode)
        return node

    def _rebuilt(
        self, node: fx.Node, places: list[int], facts: _Facts, memo: dict[fx.Node, fx.Node], mode: Any
    ) -> fx.Node:
        new = list(node.args)
        for i in places:
            operand = node.args[i]
            assert isinstance(operand, fx.Node)
            new[i] = self._narrow(operand, facts, memo, mode)
        if all(a is b for a, b in zip(new, node.args, strict=True)):
            return node
        made = insert_call(node.graph, node, mode, node.target, *new, **node.kwargs)
        return made

    def _plain_lookups(self, program: Program, facts: _Facts) -> bool:
        """``mask[arange(B)[:, None, None, None], arange(N)]`` is a view."""
        changed = False
        mode = fake_mode_of(program)
        for node in list(program.graph.nodes):
            if node.target is not aten.index.Tensor:
                continue
            source, indices = node.args[0], list(node.args[1])
            places = [facts.arange(index) for index in indices]
            if not isinstance(source, fx.Node) or any(p is None for p in places):
                continue
            shape = source.meta["val"].shape
            axes = [
                p[0] + node.meta["val"].ndim - index.meta["val"].ndim
                for p, index in zip(places, indices, strict=True)
                if p
            ]
            fits = len(places) == len(shape) and axes == sorted(set(axes))
            if not fits or not all(p and same_size(p[1], size) for p, size in zip(places, shape, strict=True)):
                continue
            view = source
            for axis in range(node.meta["val"].ndim):
                if axis not in axes:
                    view = insert_call(program.graph, node, mode, aten.unsqueeze.default, view, axis)
            node.replace_all_uses_with(view)
            changed = True
        return changed


def _equal_shapes(first: fx.Node, second: fx.Node) -> bool:
    values = first.meta["val"], second.meta["val"]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False  # a size added to positions
    a, b = (value.shape for value in values)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def _equal_dtypes(first: fx.Node, second: fx.Node) -> bool:
    return bool(first.meta["val"].dtype == second.meta["val"].dtype)
