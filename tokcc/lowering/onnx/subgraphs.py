"""The graphs inside of a node: branches and bodies of loops."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["inner_graphs", "with_inner"]


def inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node holds itself."""
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def with_inner(node: ir.Node) -> Iterator[ir.Node]:
    """Yield a node, and all nodes of the graphs inside of it, at any depth."""
    yield node
    for graph in inner_graphs(node):
        yield from graph.all_nodes()
