"""What an attention or an MLP of a decoder reads, and what it adds to the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.decoder_cuts import DecoderCuts
from tokcc.errors import AxisError
from tokcc.ir.program import Program

__all__ = ["find_branch"]

aten = torch.ops.aten
_PROJECTIONS = (aten.linear.default, aten.addmm.default, aten.mm.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_MAX_STEPS = 64


def find_branch(
    program: Program, sites: Sequence[CacheSite], cuts: DecoderCuts, layer: int, kind: str
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return three nodes: what the first projections read, what is added to the stream, what the last projection reads.

    Args:
        program: The decoder.
        sites: Its caches.
        cuts: Its stream.
        layer: 0-based.
        kind: ``attention`` or ``mlp``.

    Raises:
        AxisError: The layer is not an attention and an MLP that are added one after the other.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    middle, end = cuts.after_attention[layer], cuts.block_output[layer]
    if middle is None or end is None:
        raise _other(nodes[sites[layer].output])
    start = cuts.entry.node if layer == 0 else cuts.block_output[layer - 1]
    source, total = (start, middle) if kind == "attention" else (middle, end)
    added = [n for n in nodes[total].all_input_nodes if n.name != source]
    if nodes[total].target is not aten.add.Tensor or len(added) != 1:
        raise _other(nodes[total])
    last = _projection(added[0])
    first = _projection(nodes[sites[layer].query] if kind == "attention" else _read(last))
    return _read(first), added[0], _read(last)


def _read(projection: fx.Node) -> fx.Node:
    """Return what a projection reads, ``[B, N, C]``: some read all rows of a batch as one axis."""
    given: Any = projection.args[1 if projection.target is aten.addmm.default else 0]
    while given.meta["val"].ndim == 2 and given.target in _VIEWS:
        given = given.args[0]
    return given  # type: ignore[no-any-return]  # a projection reads a node


def _projection(node: fx.Node) -> fx.Node:
    """Return the nearest projection that a value comes from."""
    work: list[fx.Node] = [node]
    seen: set[fx.Node] = set()
    while work and len(seen) < _MAX_STEPS:
        current = work.pop(0)
        if current.target in _PROJECTIONS:
            return current
        if current not in seen:
            seen.add(current)
            work += [n for n in current.all_input_nodes if n.op == "call_function"]
    raise _other(node)


def _other(node: fx.Node) -> AxisError:
    return AxisError(
        "the score reads what attention and MLP add to the stream, and they are not told apart here",
        node=node.name,
        needed="layers in which the two are added one after the other",
        help="use a method that reads attention alone, such as `fastv`",
    )
