"""What only one branch reads is computed inside of it.

A program may hold two ways to one result side by side; a call pays for the one that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tokcc.lowering.onnx.subgraphs import inner_graphs

__all__ = ["sink"]


def sink(choices: Sequence[ir.Node]) -> None:
    """Move into each branch of some If nodes what nothing outside of it reads.

    What nothing reads at all goes: it would keep what it reads where it is.

    Args:
        choices: Nodes of sorted graphs, which are changed in place.
    """
    graphs = {id(node.graph): node.graph for node in choices}
    for graph in graphs.values():
        assert isinstance(graph, ir.Graph)
        _sink(graph, [node for node in choices if node.graph is graph])


def _sink(graph: ir.Graph, choices: Sequence[ir.Node]) -> None:
    """The same in one graph."""
    owners = {id(inner): node for node in graph.all_nodes() for inner in inner_graphs(node)}
    branches = {id(inner) for node in choices for inner in inner_graphs(node)}
    for node in reversed(list(graph)):
        if any(out.is_graph_output() for out in node.outputs):
            continue
        homes = [_home(use.node, graph, owners) for out in node.outputs for use in out.uses()]
        if not homes:
            graph.remove(node, safe=True)
            continue
        home = homes[0]
        if home is None or id(home) not in branches or any(other is not home for other in homes):
            continue
        graph.remove(node)
        home.insert_before(home[0], node)


def _home(node: ir.Node, graph: ir.Graph, owners: dict[int, ir.Node]) -> ir.Graph | None:
    """Return the graph, inside a node of ``graph``, in which a node lies; None for one of ``graph`` itself."""
    inner = None
    while node.graph is not graph:
        inner = node.graph
        node = owners[id(inner)]
    assert inner is None or isinstance(inner, ir.Graph)
    return inner
