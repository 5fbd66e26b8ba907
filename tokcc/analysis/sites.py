"""Where a reduction can be inserted: the residual stream, its layers and their cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from tokcc.analysis.attention_sites import AttentionSite, attention_sites
from tokcc.analysis.dominators import Stream, find_stream
from tokcc.analysis.mixer_sites import MixerSite, mixer_sites
from tokcc.analysis.origins import laid_out, looked_up
from tokcc.analysis.sampling_sites import SamplingSite, sampling_sites
from tokcc.analysis.special_tokens import middle_token, special_tokens
from tokcc.analysis.walk import Entry, Walk
from tokcc.errors import AxisError, PlanError
from tokcc.ir.builder import GraphBuilder, same_size
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.program import Program
from tokcc.ir.value import Value

__all__ = ["CutName", "Layer", "Sites", "find_sites", "stream_cuts", "stream_entry"]

aten = torch.ops.aten
CutName = Literal["block_input", "after_attention", "block_output", "encoder_output", "projector_output", "scan_input"]


@dataclass(frozen=True)
class Layer:
    """One block: a transformer's, or a state-space model's.

    Attributes:
        index: 0-based.
        attention: Its self-attention; None where it is deformable, or a state-space mixer takes its place.
        after_attention: Name of the stream node after the attention's residual (and norm, in post-norm models).
        block_output: Name of the stream node that leaves the block.
        label: Module path from the trace, for messages only.
        windowed: Why the attention does not run over the stream's token axis, or None when it does.
        no_cut: Why a cut is missing, or None when both are there.
        mixer: The state-space mixer, or None.
        sampling: What stands in for the attention where it is deformable, or None.
    """

    index: int
    attention: AttentionSite | None
    after_attention: str | None
    block_output: str | None
    label: str
    windowed: AxisError | None = None
    no_cut: str | None = None
    mixer: MixerSite | None = None
    sampling: SamplingSite | None = None

    @property
    def mixes(self) -> str:
        """Name of the node where tokens have met: the attention's output, or the last state of a mixer."""
        site = self.attention or self.sampling or self.mixer
        assert site is not None
        return site.mixes


@dataclass(frozen=True)
class Sites:
    """What :func:`find_sites` found.

    Attributes:
        entry: Where the residual stream begins.
        layers: The blocks, in order.
        encoder_output: Name of the last node that everything passes and that still has the token axis.
        tokens: Number of tokens at the entry: int or ``SymInt``.
        batch: Batch size at the entry: int or ``SymInt``.
        prefix: Number of special tokens (class, distillation, registers) before the others.
        suffix: The same behind them.
        axes: Axes of every value of the unreduced program, by node name.
        lost: Why the axes of a node could not be derived, by node name.
        order: Execution order by node name.
        middle: Place of a class token that stands between the other tokens, or None.
        laid_out: Sizes of the axes along which the tokens lie that are not special, where a convolution makes them:
            rows and columns of an image, frames, rows and columns of a video, or the length of a sound.
        looked_up: The tokens are looked up in a table by ids that the caller gives: they are words.
    """

    entry: Entry
    layers: tuple[Layer, ...]
    encoder_output: str
    tokens: Any
    batch: Any
    prefix: int
    suffix: int
    axes: dict[str, Value] = field(repr=False)
    lost: dict[str, AxisError] = field(repr=False)
    order: dict[str, int] = field(repr=False)
    middle: int | None = None
    laid_out: tuple[int, ...] | None = None
    looked_up: bool = False

    def has_tokens(self, name: str) -> bool:
        """Return True when a node's value carries the token axis."""
        value = self.axes.get(name)
        return isinstance(value, Value) and bool(value.spaces)

    def cut(self, layer: int, site: CutName) -> str | None:
        """Return the node of a cut, or None where the model has none."""
        if site in ("encoder_output", "projector_output"):
            return self.encoder_output
        if site == "scan_input":
            return None  # of carried states, and no point of the stream
        if site == "block_input":
            return self.entry.node if layer == 0 else self.layers[layer - 1].block_output
        block = self.layers[layer]
        return block.after_attention if site == "after_attention" else block.block_output


def find_sites(program: Program) -> Sites:
    """Find the residual stream, its layers and cuts by structure; module paths only label them.

    Insertion cuts are the dominators of the output along floating-point edges that more than one computation reads:
    two for each attention, after it and after the block.

    Raises:
        PlanError: When the model has no attention, or no residual stream with a token axis.
    """
    stream = find_stream(program)
    attentions = attention_sites(program)
    nodes = {node.name: node for node in program.graph.nodes}
    mixers: list[MixerSite | SamplingSite] = []
    if stream is not None:
        attentions = [a for a in attentions if nodes[a.output] in stream.reached]
        mixers = [*mixer_sites(stream), *sampling_sites(stream)]
    if stream is None or not (attentions or mixers):
        raise PlanError(
            "no attention found",
            needed="a transformer (scaled_dot_product_attention, or matmul-softmax-matmul), or a state-space model "
            "(`state = decay * state + update` over its tokens)",
            found="none on the way from the inputs to the outputs",
            help="token reduction applies to transformers and state-space models; check that the right module was "
            "exported",
        )
    first = min((site.mixes for site in (*attentions, *mixers)), key=lambda name: stream.order[nodes[name]])
    entry_node = stream_entry(stream, nodes[first])
    walk = _annotate(program, entry_node, attentions, nodes[first])
    axes = {node.name: value for node, value in walk.env.items() if isinstance(value, Value)}
    assert walk.entry is not None
    assert walk.tokens is not None
    assert walk.batch is not None
    layers = _layers(stream, attentions, mixers, axes, walk, nodes, entry_node)
    place = (walk.entry.token_axis, walk.entry.batch_axis)
    tokened = [
        d
        for d in stream.dominators
        if d.name in axes and (axes[d.name].axis_of(walk.tokens), axes[d.name].batch_axis()) == place
    ]
    middle = middle_token(entry_node, walk.entry.token_axis)
    # What deformable attention samples is maps, whose tokens are concatenated too.
    plain = middle is not None or any(layer.sampling is not None for layer in layers)
    prefix, suffix = (0, 0) if plain else special_tokens(program, entry_node, walk.entry.token_axis, axes)
    return Sites(
        entry=walk.entry,
        layers=tuple(layers),
        encoder_output=(tokened[-1] if tokened else entry_node).name,
        tokens=walk.tokens.old,
        batch=walk.batch.old,
        prefix=prefix,
        suffix=suffix,
        axes=axes,
        lost=walk.lost,
        order={node.name: i for node, i in stream.order.items()},
        middle=middle,
        laid_out=laid_out(entry_node, walk.tokens.old, prefix + suffix),
        looked_up=looked_up(program, entry_node),
    )


def stream_entry(stream: Stream, first: fx.Node) -> fx.Node:
    """Return the last branching dominator before the first attention.

    Raises:
        PlanError: When there is none.
    """
    before = [d for d in stream.dominators if stream.order[d] < stream.order[first]]
    points = [d for d in before if stream.branching(d) and d.meta["val"].ndim >= 3]
    chosen = points[-1] if points else None
    if chosen is None or chosen.meta["val"].ndim != 3:
        raise PlanError(
            "no residual stream found before the first attention",
            node=first.name,
            needed="a value [batch, tokens, channels] that both the attention and its residual read",
            found="none" if chosen is None else f"{chosen.name} {list(chosen.meta['val'].shape)}",
            help="models without residual connections, or with images as 4-D streams, are not supported",
        )
    return chosen


def _annotate(program: Program, entry: fx.Node, attentions: Sequence[AttentionSite], first: fx.Node) -> Walk:
    """Derive all axes; the token axis of the entry is the one that lands on the query rows, or that a state runs over.

    Args:
        program: The program.
        entry: Where the stream begins.
        attentions: All of them.
        first: The first place where tokens meet.
    """
    site = next((a for a in attentions if a.output == first.name), None)
    walks: list[Walk] = []
    for token_axis, batch_axis in ((1, 0), (0, 1)):
        walk = Walk(program, GraphBuilder(fake_mode_of(program)), Entry(entry.name, token_axis, batch_axis))
        walk.run()
        met = walk.env[first if site is None else walk.nodes[site.query]]
        if isinstance(met, Value) and len(met.axes) >= 3:
            sampled = first.target is aten.grid_sampler.default  # [B H, D, N, points]
            place: Any = -2 if site is not None else 2 if sampled else first.args[2]
            if any(f.space is walk.tokens for f in met.axes[place]):
                return walk
        walks.append(walk)
    return walks[0]


def _layers(
    stream: Stream,
    attentions: list[AttentionSite],
    mixers: list[MixerSite | SamplingSite],
    axes: dict[str, Value],
    walk: Walk,
    nodes: dict[str, fx.Node],
    entry: fx.Node,
) -> list[Layer]:
    own: list[AttentionSite | MixerSite | SamplingSite] = []
    own += [a for a in attentions if _is_self_attention(a, axes, walk, nodes)]
    own += [m for m in mixers if isinstance(m, MixerSite) or _samples_itself(m, axes, walk)]
    own = sorted(own, key=lambda site: stream.order[nodes[site.mixes]])
    places = [stream.order[nodes[site.mixes]] for site in own]
    layers: list[Layer] = []
    for i, site in enumerate(own):
        attention = site if isinstance(site, AttentionSite) else None
        start = places[i]
        following = places[i + 1] if i + 1 < len(own) else len(stream.order)
        between = [d for d in stream.dominators if start < stream.order[d] < following]
        with_tokens = [d for d in between if d.name in axes and axes[d.name].spaces] or (
            [d for d in between if d.meta["val"].ndim == 3] if not axes[entry.name].spaces else []
        )
        points = [d for d in with_tokens if stream.branching(d)]
        after, output = stream_cuts(points, with_tokens, last=i + 1 == len(own))
        if isinstance(site, MixerSite):
            after, output = None, _last_join(with_tokens)
        whole = output is not None and (after is not None or isinstance(site, MixerSite))
        no_cut = None if whole else _why_no_cut(points, with_tokens, between)
        windowed = None
        read = site.output if attention is None else attention.query
        if read not in axes or not axes[read].spaces:
            windowed = _why_lost(nodes[read], walk)
        layers.append(
            Layer(
                index=i,
                attention=attention,
                after_attention=None if after is None else after.name,
                block_output=None if output is None else output.name,
                label=_label(nodes[site.output]),
                windowed=windowed,
                no_cut=no_cut,
                mixer=site if isinstance(site, MixerSite) else None,
                sampling=site if isinstance(site, SamplingSite) else None,
            )
        )
    return layers


def stream_cuts(points: list[fx.Node], between: list[fx.Node], *, last: bool) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the cuts of a layer: after its attention, and its output.

    Args:
        points: Dominators behind its attention, and before the next one, that several computations read.
        between: All dominators there.
        last: Whether it is the last layer.
    """
    if not points:
        # A last block that only feeds a head: its dominators have one user each.
        return (None, between[-1]) if between and last else (None, None)
    after = points[0]
    if len(points) > 1 and not last:
        return after, points[-1]
    behind = between[between.index(after) + 1 :]
    if not last:
        # One point per attention, as in a parallel block: its only cut is its output.
        return None, after
    if not behind:
        return None, after
    if after.target in (aten.layer_norm.default, aten.rms_norm.default):
        norms = [d for d in behind if d.target is after.target]
        return after, norms[0] if norms else behind[0]
    return after, behind[0]


def _last_join(between: list[fx.Node]) -> fx.Node | None:
    """Return where the last branch of a block joins the stream: the mixer's, or that of an MLP behind it.

    Args:
        between: What everything passes behind the mixer and before the next one, with tokens.
    """
    joined = next(iter(between), None)
    for node in between:
        if node.target is aten.add.Tensor and joined in node.all_input_nodes:
            joined = node
    return joined


def _why_no_cut(points: list[fx.Node], with_tokens: list[fx.Node], between: list[fx.Node]) -> str:
    """Say what stands behind an attention that has not got both cuts."""
    if not points:
        where = "that several computations read" if with_tokens else "with the tokens of the stream"
        return f"no point behind its attention {where}"
    only = f"one point of the stream behind its attention, {points[0].name}"
    behind = between[between.index(points[0]) + 1 :]
    if not behind:
        return f"{only}: attention and MLP read the same input, or nothing follows"
    following = behind[0]
    if following not in with_tokens:
        return f"{only}: {following.name} behind it does not have its tokens"
    readers = ", ".join(sorted(str(user.name) for user in following.users))
    return f"{only}: {following.name} behind it is only read by {readers}"


def _is_self_attention(site: AttentionSite, axes: dict[str, Value], walk: Walk, nodes: dict[str, fx.Node]) -> bool:
    """Queries and keys are both tokens of the stream, or (windows) both come from the stream with lost axes."""
    query, key = axes.get(site.query), axes.get(site.key)
    if query is None or key is None or query.rank < 3:
        return False
    rows = query.axes[-2]
    columns = key.axes[-1 if site.transposed else -2]
    own = walk.tokens
    if any(f.space is own for f in rows):
        return any(f.space is own for f in columns)
    if any(f.space is own for f in columns):
        return False
    return _why_lost(nodes[site.query], walk) is not None and same_size(
        query.old[-2], key.old[-1 if site.transposed else -2]
    )


def _samples_itself(site: SamplingSite, axes: dict[str, Value], walk: Walk) -> bool:
    """Those that sample are tokens of the stream, not queries of a decoder."""
    sampled = axes.get(site.output)
    return sampled is not None and walk.tokens in sampled.spaces


def _why_lost(node: fx.Node, walk: Walk) -> AxisError | None:
    """The nearest refused operation on the way back from a node."""
    seen: set[fx.Node] = set()
    front = [node]
    while front:
        current = front.pop(0)
        if current.name in walk.lost:
            return walk.lost[current.name]
        for operand in current.all_input_nodes:
            if operand not in seen and len(seen) < 200:
                seen.add(operand)
                front.append(operand)
    return None


def _label(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if entry[0]]
    return paths[-1] if paths else node.name
