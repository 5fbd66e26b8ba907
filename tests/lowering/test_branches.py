"""What only one branch reads is computed inside of it."""

from __future__ import annotations

import onnx_ir as ir
import torch

from tests.lowering.harness import Case, Input, program_of
from tokcc.backends.onnx import build_onnx

ops = torch.ops.tokcc


def _inside(node: ir.Node) -> dict[str, list[str]]:
    return {name: [inner.op_type for inner in attribute.as_graph()] for name, attribute in node.attributes.items()}


def test_each_side_goes_into_its_branch() -> None:
    def body(b, x, y):  # type: ignore[no-untyped-def]
        shared = b.exp(x)
        one, other = b.sqrt(b.add(shared, 1.0)), b.mul(b.sub(shared, y), 2.0)
        return b.call(ops.choose_by_size.default, other, one, [b.size(x, 1)], [5], [2**62])

    x = Input(("B", "N", 4))
    graph = build_onnx(program_of(Case("both", body, (x, x)), dynamic=True)).graph
    (choice,) = [node for node in graph if node.op_type == "If"]
    outside = [node.op_type for node in graph]
    assert "Exp" in outside
    assert not {"Sqrt", "Mul", "Sub"} & set(outside)
    assert _inside(choice) == {"then_branch": ["Add", "Sqrt", "Identity"], "else_branch": ["Sub", "Mul", "Identity"]}


def test_what_leaves_the_graph_stays_outside() -> None:
    def body(b, x):  # type: ignore[no-untyped-def]
        root = b.sqrt(b.exp(x))
        return b.call(ops.choose_by_size.default, x, root, [b.size(x, 1)], [5], [2**62]), root

    graph = build_onnx(program_of(Case("leaving", body, (Input(("B", "N", 4)),)), dynamic=True)).graph
    (choice,) = [node for node in graph if node.op_type == "If"]
    assert {"Exp", "Sqrt"} <= {node.op_type for node in graph}
    assert _inside(choice) == {"then_branch": ["Identity"], "else_branch": ["Identity"]}


def test_what_nothing_reads_keeps_nothing_outside() -> None:
    def body(b, x):  # type: ignore[no-untyped-def]
        root = b.exp(x)
        # A reshape that keeps an axis does not ask for its size.
        root = b.sqrt(b.reshape(root, [b.size(root, 0), b.size(root, 1), 2, 2]))
        other = b.reshape(x, [b.size(x, 0), b.size(x, 1), 2, 2])
        return b.call(ops.choose_by_size.default, other, root, [b.size(x, 1)], [5], [2**62])

    graph = build_onnx(program_of(Case("unread", body, (Input(("B", "N", 4)),)), dynamic=True)).graph
    (choice,) = [node for node in graph if node.op_type == "If"]
    assert not {"Exp", "Sqrt"} & {node.op_type for node in graph}
    assert _inside(choice)["then_branch"] == ["Exp", "Reshape", "Sqrt", "Identity"]
