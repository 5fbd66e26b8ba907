"""Remove what a trace contains and inference does not need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import same_size
from tokcc.ir.edit import remove_dead, replace
from tokcc.ir.program import PassResult, Program

__all__ = ["DropNoops"]

aten = torch.ops.aten

_ASSERTS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_IDENTITIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    a, b = first.meta["val"].shape, second.meta["val"].shape
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class DropNoops:
    """Erase asserts, copies, dropout in evaluation and views of the same shape; make every view a reshape.

    A copy may be what makes a later ``view`` legal, so views become ``reshape`` in the same pass.
    """

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTS:
                program.graph.erase_node(node)
                changed = True
            elif node.target in _VIEWS:
                node.target = aten.reshape.default
                changed = True
            elif self._forwards(node):
                replace(node, _first(node))
                changed = True
        for node in list(program.graph.nodes):
            if node.target is not aten.reshape.default:
                continue
            if _first(node).target is aten.reshape.default:
                # Two reshapes are one; seen from the first operand they often are none (fusing and splitting B*H).
                node.args = (_first(node).args[0], *node.args[1:])
                changed = True
            if _same_shape(node, _first(node)):
                replace(node, _first(node))
                changed = True
        changed |= remove_dead(program.graph)
        return PassResult(program.refreshed(), changed)

    def _forwards(self, node: fx.Node) -> bool:
        if node.target in _IDENTITIES:
            return True
        if node.target in _DROPOUTS:
            return len(node.args) > 2 and node.args[2] is False
        if node.target is aten._to_copy.default or node.target is aten.to.dtype:
            source: Any = _first(node).meta["val"]
            value = node.meta["val"]
            return bool(source.dtype == value.dtype and source.device == value.device)
        if node.target is aten.slice.Tensor:
            step = node.args[4] if len(node.args) > 4 else 1
            return bool(step == 1) and _same_shape(node, _first(node))
        if node.target is aten.expand.default:
            return _same_shape(node, _first(node))
        return False


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first
