"""The residual stream of a decoder with caches: where it begins, and the cuts of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.dominators import find_stream
from tokcc.analysis.sites import stream_cuts, stream_entry
from tokcc.analysis.walk import Entry
from tokcc.errors import PlanError
from tokcc.ir.program import Program

__all__ = ["DecoderCuts", "decoder_cuts"]


@dataclass(frozen=True)
class DecoderCuts:
    """The stream of a decoder. Nodes are given by name.

    Attributes:
        entry: Where it begins.
        after_attention: For each layer, the stream behind its attention; None where attention and MLP are parallel.
        block_output: For each layer, what leaves it; None where that is not on the stream.
    """

    entry: Entry
    after_attention: tuple[str | None, ...]
    block_output: tuple[str | None, ...]


def _alike(node: fx.Node, other: fx.Node) -> bool:
    return str(node.meta["val"].shape) == str(other.meta["val"].shape)


def decoder_cuts(program: Program, sites: Sequence[CacheSite]) -> DecoderCuts:
    """Find the cuts between a decoder's attentions.

    Keys are read from the cache too, so that the layers are given by the caches and not by attentions over one space.

    Raises:
        PlanError: When there is no residual stream.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    stream = find_stream(program)
    if stream is None:
        raise PlanError("the decoder has no residual stream", needed="a hidden state that all layers add to")
    entry = stream_entry(stream, nodes[sites[0].output])
    starts = [stream.order[nodes[site.output]] for site in sites]
    after: list[str | None] = []
    output: list[str | None] = []
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else len(stream.order)
        between = [d for d in stream.dominators if start < stream.order[d] < stop]
        points = [d for d in between if stream.branching(d) and len(d.meta["val"].shape) == 3]
        first, second = stream_cuts(points, between, last=i + 1 == len(starts))
        if second is not None and second not in points:
            # Behind the last layer a norm and a head follow, which read the stream alone.
            sums = [d for d in between if d.target is torch.ops.aten.add.Tensor and _alike(d, entry)]
            second = sums[-1] if sums else None
        after.append(None if first is None else first.name)
        output.append(None if second is None else second.name)
    return DecoderCuts(Entry(entry.name), tuple(after), tuple(output))
