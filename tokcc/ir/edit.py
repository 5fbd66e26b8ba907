"""Small edits of a graph in place, with fakes kept right."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from tokcc.errors import CaptureError
from tokcc.ir.program import Program

__all__ = ["evaluate", "fake_mode_of", "insert_call", "is_float", "remove_dead", "replace"]


def fake_mode_of(program: Program) -> FakeTensorMode:
    """Return the fake mode that the program was traced in."""
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    mode = detect_fake_mode(values)
    if mode is None:
        raise CaptureError("the traced graph holds no fake tensors", help="export the model again with torch.export")
    return mode


def evaluate(node: fx.Node, mode: FakeTensorMode) -> None:
    """Compute a call's fake from its operands' fakes."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]  # call_function targets are callable


def insert_call(
    graph: fx.Graph, before: fx.Node, mode: FakeTensorMode, target: Any, *args: Any, **kwargs: Any
) -> fx.Node:
    """Insert a call before a node and evaluate its fake; the module path is taken over from that node."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in before.meta.items() if key in ("nn_module_stack", "stack_trace")}
    evaluate(node, mode)
    return node


def replace(node: fx.Node, other: fx.Node) -> None:
    """Let every user of a node read another one, and erase the node."""
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def remove_dead(graph: fx.Graph) -> bool:
    """Erase calls without users; placeholders stay."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
            changed = True
    return changed


def is_float(node: fx.Node) -> bool:
    """Return True for a node whose value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
