"""Caches that are not full yet skip their eviction.

Below its capacity a cache loses nothing, but a graph without branches would still rate, sort and copy every entry. Here
everything behind the cache of a layer, its attention included, goes into the two branches of an ``If``: one as it is,
and one in which what is joined leaves as it is. Both branches hold the same few nodes and no weights. An attention that
is one of two from which a call chooses takes the choice along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tokcc.lowering.onnx.recorder import Recorder
from tokcc.lowering.onnx.subgraphs import inner_graphs, with_inner

__all__ = ["Passages"]

_Reads = dict[ir.Node, list[ir.Node]]


@dataclass
class Passages:
    """What lowerings noted on the way.

    Attributes:
        attentions: The nodes of each attention to a cache.
        choices: Nodes that choose between two ways; copies of them are added.
    """

    attentions: list[list[ir.Node]] = field(default_factory=list)
    choices: list[ir.Node] = field(default_factory=list)
    _selections: dict[ir.Value, tuple[ir.Value, Any]] = field(default_factory=dict)

    def selects(self, index: ir.Value, everything: ir.Value, length: Any) -> None:
        """Note a selection.

        Args:
            index: What stays.
            everything: bool ``[1]``: all of it.
            length: How many entries it was chosen from: an int or a symbolic size.
        """
        self._selections[index] = everything, length

    def takes(self, index: ir.Value, length: Any) -> None:
        """Note what is taken from ``length`` entries: only from as many as were chosen from, all of them are all."""
        known = self._selections.get(index)
        if known is not None and not statically_known_true(known[1] == length):
            del self._selections[index]

    def apply(self, op: Recorder, outputs: list[ir.Value]) -> None:
        """Rewrite the recorded nodes.

        Args:
            op: Holds the nodes; a branch is put behind all others, so that the graph must be sorted.
            outputs: What leaves the graph; replaced in place.
        """
        reads = {node: _reads(node) for node in op.nodes}
        before = [_ancestors(reads, self._with_choice(reads, attention)) for attention in self.attentions]
        taken: set[ir.Node] = set()
        regions = []
        for index, (everything, _) in self._selections.items():
            for region in self._regions(reads, before, index, everything):
                if taken.isdisjoint(region.nodes) and everything.producer() not in region.nodes:
                    taken |= set(region.nodes)
                    regions.append(region)
        for region in regions:
            self.choices += _branch(op, region, outputs, self.choices)

    def _with_choice(self, reads: _Reads, attention: list[ir.Node]) -> list[ir.Node]:
        """Return the nodes of an attention and the choice of which it is one way."""
        own = set(attention)
        return [*attention, *(choice for choice in self.choices if not own.isdisjoint(reads.get(choice, [])))]

    def _regions(
        self, reads: _Reads, before: list[set[ir.Node]], index: ir.Value, everything: ir.Value
    ) -> list[_Region]:
        """Return what a selection separates: a region for each layer, which may attend several times."""
        found: list[_Region] = []
        for layer, gathers in self._by_attention(reads, before, _gathers(index)).items():
            region = _region(reads, gathers, before[layer], everything)
            for other in [other for other in found if not set(other.nodes).isdisjoint(region.nodes)]:
                found.remove(other)
                both = [*other.gathers, *region.gathers]
                region = _region(reads, both, region.attention | other.attention, everything)
            found.append(region)
        return found

    def _by_attention(
        self, reads: _Reads, before: list[set[ir.Node]], gathers: list[ir.Node]
    ) -> dict[int, list[ir.Node]]:
        """Layers may share a selection: return what is taken by it for the cache of each attention.

        An attention reads keys and values that are taken from, and states are made of what it leaves.
        """
        found: dict[int, list[ir.Node]] = {}
        for gather in gathers:
            source = _source(gather)
            reading = [i for i, ancestors in enumerate(before) if source in ancestors]
            if not reading:
                own = _ancestors(reads, [source])
                reading = [i for i, nodes in enumerate(self.attentions) if own.intersection(nodes)][-1:]
            if reading:
                found.setdefault(reading[0], []).append(gather)
        return found


@dataclass(frozen=True)
class _Region:
    """What goes into the branches.

    Attributes:
        nodes: In order.
        gathers: Those that take what stays.
        attention: All that the attention in between needs, itself included.
        everything: bool ``[1]``: everything stays.
    """

    nodes: list[ir.Node]
    gathers: list[ir.Node]
    attention: set[ir.Node]
    everything: ir.Value


def _gathers(index: ir.Value) -> list[ir.Node]:
    """Return the nodes that take by an index; none where it is used for anything else, too."""
    spread = [node for node, _ in index.uses()]
    if any(node.op_type != "Unsqueeze" for node in spread):
        return []
    gathers = [node for unsqueeze in spread for node, _ in unsqueeze.outputs[0].uses()]
    made = (node.op_type == "GatherND" and node.inputs[0] is not None and node.inputs[0].producer() for node in gathers)
    return gathers if all(made) else []


def _source(gather: ir.Node) -> ir.Node:
    """Return what makes the tensor that is taken from."""
    producer = None if gather.inputs[0] is None else gather.inputs[0].producer()
    assert producer is not None  # `_gathers` leaves inputs of the graph alone
    return producer


def _region(reads: _Reads, gathers: list[ir.Node], attention: set[ir.Node], everything: ir.Value) -> _Region:
    """Return all that lies between what is taken from and what leaves, the attention in between included.

    Args:
        reads: What each node reads.
        gathers: What takes the entries that stay.
        attention: All that the attention needs, itself included.
        everything: bool ``[1]``: everything stays.
    """
    sources = {_source(gather) for gather in gathers}
    needed = attention | _ancestors(reads, gathers)
    reached: set[ir.Node] = set()
    for node in reads:  # in order, so that one walk finds all that follows
        if node in needed and (node in sources or any(read in reached for read in reads[node])):
            reached.add(node)
    return _Region([node for node in reads if node in reached], gathers, attention, everything)


def _branch(op: Recorder, region: _Region, outputs: list[ir.Value], choices: list[ir.Node]) -> list[ir.Node]:
    """Put a region into the branches of an If; return the copies of the choices in it."""
    inside = {inner for node in region.nodes for inner in with_inner(node)}
    own = [value for node in region.nodes for value in node.outputs]
    leaving = [v for v in own if any(v is out for out in outputs) or any(u.node not in inside for u in v.uses())]
    if any(value.type is None for value in leaving):
        return []  # the outputs of a branch are typed
    name = region.gathers[0].name or "GatherND"
    condition = op("Squeeze", region.everything, op.ints([0]))
    remaining = set(region.nodes)
    op.nodes[:] = [node for node in op.nodes if node not in remaining]
    evicted = ir.Graph([], leaving, nodes=region.nodes, opset_imports={"": op.opset}, name=f"{name}/evicted")
    whole, copies = _without_eviction(op, evicted, region, f"{name}/whole")
    branch = ir.Node(
        "",
        "If",
        [condition],
        ir.convenience.convert_attributes({"then_branch": whole, "else_branch": evicted}),
        num_outputs=len(leaving),
        name=op.unique(f"{name}/If"),
    )
    for value, outside in zip(leaving, branch.outputs, strict=True):
        outside.name, outside.type, outside.shape = value.name, value.type, value.shape
        value.name = op.unique(f"{value.name}/evicted")
        for use in list(value.uses()):
            if use.node not in inside:
                use.node.replace_input_with(use.idx, outside)
        outputs[:] = [outside if out is value else out for out in outputs]
    op.nodes.append(branch)
    return [copies[choice] for choice in choices if choice in copies]


def _without_eviction(
    op: Recorder, evicted: ir.Graph, region: _Region, name: str
) -> tuple[ir.Graph, dict[ir.Node, ir.Node]]:
    """Return a copy of the branch in which everything stays, and the copies of its nodes."""
    whole = evicted.clone(allow_outer_scope_values=True)
    whole.name = name
    places = {node: place for place, node in enumerate(region.nodes)}
    copies = list(whole)
    for gather in region.gathers:
        copy = copies[places[gather]]
        source = copy.inputs[0]
        assert source is not None
        copy.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
    for node in reversed(copies):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            whole.remove(node, safe=True)
            for inner in with_inner(node):  # a graph in a node goes on reading otherwise
                for place in range(len(inner.inputs)):
                    inner.replace_input_with(place, None)
    seen: set[int] = set()
    for place, value in enumerate(whole.outputs):
        if id(value) in seen:  # what leaves twice needs a value of its own
            twin = ir.Node("", "Identity", [value], num_outputs=1, name=op.unique(f"{name}/Identity"))
            twin.outputs[0].type = value.type
            whole.append(twin)
            whole.outputs[place] = twin.outputs[0]
        seen.add(id(value))
    for node in whole.all_nodes():
        node.name = op.unique(node.name or node.op_type)
        for value in node.outputs:
            value.name = op.unique(value.name or node.op_type)
    return whole, {node: copies[place] for node, place in places.items() if copies[place].graph is whole}


def _reads(node: ir.Node) -> list[ir.Node]:
    """Return what a node reads, the graphs in it included."""
    values = [value for inner in with_inner(node) for value in inner.inputs if value is not None]
    values += [value for graph in inner_graphs(node) for value in graph.outputs]
    return [producer for value in values if (producer := value.producer()) is not None]


def _ancestors(reads: _Reads, nodes: Sequence[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    work = list(nodes)
    while work:
        node = work.pop()
        if node not in found and node in reads:
            found.add(node)
            work += reads[node]
    return found
