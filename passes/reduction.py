"""One planned reduction: score, select and reduce at a cut, making a child token space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.rules.attention import key_bias, masking_value
from tokcc.analysis.sites import Sites
from tokcc.analysis.walk import Walk
from tokcc.errors import AxisError
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.ahead import ahead_of
from tokcc.passes.budget import Count
from tokcc.passes.cut import AttentionView, Chosen, Cut
from tokcc.passes.padding import padding_of
from tokcc.passes.piece import Reducer, Score, Selector

__all__ = ["PlannedReduction", "attention_source"]

aten = torch.ops.aten


@dataclass(frozen=True)
class PlannedReduction:
    """A reduction at one cut.

    Attributes:
        step: 0-based policy step.
        name: The step's name, for messages and node names.
        where: The step's place in the policy, for messages.
        node: ``prune`` or ``merge``.
        layer: 0-based.
        site: Which cut of the layer.
        cut: Name of the node.
        count: The budget there.
        first: Protected leading tokens.
        last: Protected trailing tokens.
        score: Or None.
        select: The selector.
        reduce: The reducer.
        restore: What to do where a rule needs all tokens.
        seed: For random pieces.
    """

    step: int
    name: str
    where: str
    node: str
    layer: int
    site: str
    cut: str
    count: Count
    first: int
    last: int
    score: Score | None
    select: Selector
    reduce: Reducer
    restore: str
    seed: int
    sites: Sites
    made: list[TokenSpace]
    """Where the space behind each reduction is noted: the one before it again, when it removes nothing."""
    stage: int = 0
    """Which of the step's layers this is."""
    stages: int = 1
    """How many layers the step has."""
    middle: int | None = None
    """Place in the unreduced model of a protected token between the others."""

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Emit the reduction and return the reduced stream."""
        try:
            with walk.builder.inserting(f"{self.name}@{self.layer}"):
                return self._apply(walk, node, value)
        except AxisError as error:
            raise self.refused(error) from error

    def refused(self, error: AxisError) -> AxisError:
        """Return an error of the graph as one about this reduction."""
        place = f"at layer {self.layer}" if self.sites.layers else "behind the projector"
        return error.about(f"cannot {self.node} tokens {place}", policy=self.where)

    def _apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        b = walk.builder
        assert walk.batch is not None
        space, axis = _current_space(walk, value)
        batch_axis = value.batch_axis()
        if batch_axis is None or value.rank != 3:
            walk.ctx.fail("the stream is not [batch, tokens, channels] at this cut")
        x = value.handle if axis == 1 else b.transpose(value.handle, 0, 1)
        if space.root.real is None and self.sites.layers:
            space.root.real = padding_of(walk, self.sites, self.layer)
        attention = attention_source(walk, self.sites, space, self.layer)
        cut = Cut(
            ctx=walk.ctx,
            x=x,
            space=space,
            batch=walk.batch,
            layer=self.layer,
            num_layers=len(self.sites.layers),
            count=self.count,
            first=self.first,
            last=self.last,
            seed=self.seed,
            attention=attention,
            stage=self.stage,
            stages=self.stages,
            ahead=ahead_of(walk, self.sites, node, value, self.first),
            stream=_stream_source(walk, self.sites, space, {node.name: value}),
            middle=_place(space, self.middle),
            initial_middle=self.middle,
            mixed=_mixer_source(walk, self.sites, space, self.layer),
        )
        if self._nothing_to_remove(cut):
            self.made.append(space)
            return value
        score = None if self.score is None else self.score.emit(cut)
        chosen = self.select.select(cut, score)
        if not isinstance(chosen, self.reduce.takes):
            walk.ctx.fail(
                f"`{self.reduce.kind}` cannot take what `{self.select.kind}` selects",
                help="`drop` goes with selectors of single tokens, `weighted_mean` with those of pairs",
            )
        if self.reduce.marks:
            self.reduce.reduce(cut, chosen, space)
            self.made.append(space)
            return value
        if self._removes_nothing(cut, chosen):
            # What the selector emitted is read by nobody, and goes.
            self.made.append(space)
            return value
        child = TokenSpace(
            name=f"tokens/{self.layer}.{self.site}",
            size=None,
            old=space.root.old,
            parent=space,
            prefix=self.first,
            suffix=self.last,
            step=self.step,
            restore=self.restore,
            sequence=False,
        )
        reduced = self.reduce.reduce(cut, chosen, child)
        if self.reduce.bypasses:
            walk.notes["bypass", self.layer] = child
            self.made.append(space)
            return value
        place = getattr(chosen, "middle", None)
        child.sequence = child.sequence or child.ascending
        if cut.middle is not None and place is not None:
            child.fixed = {cut.middle: place}
        b.mark_prefix(reduced, x, self.first)
        self.made.append(child)
        axes = list(value.axes)
        axes[axis] = (Factor(child, space.root.old),)
        handle = reduced if axis == 1 else b.transpose(reduced, 0, 1)
        value = value.having(handle=handle, axes=tuple(axes), side=False)
        return value if b.shape(reduced)[2] == b.shape(x)[2] else self._rewidened(walk, node, value)

    def _rewidened(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Return a stream whose tokens have another width, with which the program must end."""
        width, old = walk.builder.shape(value.handle)[2], value.old[2]
        if any(user.op != "output" for user in node.users):
            walk.ctx.fail(
                f"`{self.reduce.kind}` makes tokens of width {width}, and what follows counts on {old}",
                help=f"cut where the tokens leave the model, or use weights that make {old}",
            )
        return value.having(axes=(*value.axes[:2], (Factor(None, width),)), old=(*value.old[:2], width))

    def _nothing_to_remove(self, cut: Cut) -> bool:
        """True in a program of static length with at most one candidate: the last one always stays."""
        fixed = isinstance(self.sites.tokens, int) and isinstance(cut.candidates, int)
        return fixed and cut.candidates <= 1 and not self.reduce.always

    def _removes_nothing(self, cut: Cut, chosen: Chosen) -> bool:
        """True where every token stays, whatever the input: in a program of static length and without padding."""
        sizes = (self.sites.tokens, cut.tokens, chosen.size)
        always_full = cut.valid is None and getattr(chosen, "valid", None) is None
        same = all(isinstance(size, int) for size in sizes) and chosen.size == cut.tokens
        return always_full and same and not self.reduce.always


def _current_space(walk: Walk, value: Value) -> tuple[TokenSpace, int]:
    for axis, factors in enumerate(value.axes):
        if len(factors) == 1 and factors[0].space is not None and not factors[0].space.is_batch:
            return factors[0].space, axis
    walk.ctx.fail("the token axis is not known at this cut")


def _place(space: TokenSpace, middle: int | None) -> int | None:
    """Return where a protected token of the unreduced model stands now."""
    for step in space.chain[1:]:
        middle = None if middle is None else step.fixed.get(middle)
    return middle


def _mixer_source(walk: Walk, sites: Sites, space: TokenSpace, layer: int) -> Callable[[], Any]:
    """Return what reads the output of a layer's state-space mixer, ``[B, N, E]``."""

    def mixed() -> Any:
        mixer = sites.layers[layer].mixer if sites.layers else None
        if mixer is None:
            walk.ctx.fail("this layer has no state-space mixer", help="use a score on `features`, or on attention")
        value = _aligned(walk, walk.env[walk.nodes[mixer.output]], space)
        batch, tokens = value.batch_axis(), value.axis_of(space)
        if value.rank != 3 or batch is None or tokens is None:
            walk.ctx.fail("what this layer's mixer gives is not one vector for each token")
        return walk.builder.permute(value.handle, [batch, tokens, 3 - batch - tokens])

    return mixed


def attention_source(walk: Walk, sites: Sites, space: TokenSpace, own: int) -> Callable[..., AttentionView]:
    """Return what reads a layer's attention in the current token space."""

    def attention(layer: int | None = None) -> AttentionView:
        if not sites.layers:
            walk.ctx.fail(
                "the tokens behind the projector are not those that the tower's attention is about",
                help="use a score or metric on `features`, or cut at `encoder_output` where the projector keeps tokens",
            )
        block = sites.layers[own if layer is None else layer]
        site = block.attention
        if site is None:
            walk.ctx.fail(
                f"layer {block.index} has no attention: a state-space scan mixes its tokens",
                help="use a score or metric on `features`, or the score `mixer_output`",
            )
        if block.windowed is not None:
            walk.ctx.fail(
                "the attention of this layer runs in windows, so its scores do not compare all tokens",
                help="use a score or metric on `features`",
            )
        names = (site.query, site.key, site.value)
        query, key, value = (walk.env[walk.nodes[name]] for name in names)
        if site.transposed:
            key = key.having(
                handle=walk.builder.transpose(key.handle, key.rank - 1, key.rank - 2),
                axes=(*key.axes[:-2], key.axes[-1], key.axes[-2]),
                old=(*key.old[:-2], key.old[-1], key.old[-2]),
            )
        q, k, v = (_canonical(walk, operand, space) for operand in (query, key, value))
        q_heads, k_heads = walk.builder.shape(q)[1], walk.builder.shape(k)[1]
        if q_heads != k_heads:
            k = _repeat_heads(walk, k, q_heads // k_heads)
        probs = None
        if site.probs is not None:
            table = walk.env[walk.nodes[site.probs]]
            probs = _canonical_probs(walk, table, space)
        mask = None if site.mask is None else _mask(walk, walk.env[walk.nodes[site.mask]], space)
        bias = key_bias(walk.ctx, space, walk.builder.dtype(q)) if space.reduced else None
        if bias is not None:
            b = walk.builder
            bias = b.unsqueeze(b.unsqueeze(bias, 1), 1)
            mask = bias if mask is None else _joined(walk, mask, bias)

        def attended() -> Any:
            return _canonical(walk, walk.env[walk.nodes[site.output]], space)

        return AttentionView(q, k, v, mask, 1.0 if site.scale is None else site.scale, probs, attended)

    return attention


def _stream_source(walk: Walk, sites: Sites, space: TokenSpace, own: Mapping[str, Value]) -> Callable[[int], Any]:
    """Return what reads the output of a layer in the current token space, ``[B, N, C]``; the cut is not walked yet."""

    def stream(layer: int) -> Any:
        name = sites.layers[layer].block_output if sites.layers else None
        value = None if name is None else own.get(name) or walk.env.get(walk.nodes[name])
        if not isinstance(value, Value) or value.rank != 3 or not value.spaces:
            walk.ctx.fail(
                f"the output of layer {layer} is not a stream of tokens that can be read here",
                help="choose layers that are behind each other, before the cut, in the tower that is cut",
            )
        value = _aligned(walk, value, space)
        return value.handle if value.axis_of(space) == 1 else walk.builder.transpose(value.handle, 0, 1)

    return stream


def _joined(walk: Walk, mask: Any, bias: Any) -> Any:
    b = walk.builder
    if b.dtype(mask) == torch.bool:
        return b.where(mask, bias, masking_value(b.dtype(bias)))
    return b.add(mask, bias)


def _aligned(walk: Walk, value: Value, space: TokenSpace) -> Value:
    """Bring every token axis of a value to the current space."""
    for axis, factors in enumerate(value.axes):
        for position, factor in enumerate(factors):
            if factor.space is not None and not factor.space.is_batch and factor.space is not space:
                value = walk.ctx.remap(value, axis, position, space, None)
    return value


def _canonical(walk: Walk, value: Value, space: TokenSpace) -> Any:
    """Return ``[B, H, N, D]`` of a query, key or value in whatever layout the model has it."""
    b = walk.builder
    value = _aligned(walk, value, space)
    lead = [f for axis in value.axes[:-2] for f in axis]
    if not lead or lead[0].space is None or not lead[0].space.is_batch:
        walk.ctx.fail("the attention's batch axis is not in front")
    heads: Any = 1
    for factor in lead[1:]:
        heads = heads * factor.old
    if value.rank == 4 and len(value.axes[0]) == 1:
        return value.handle
    assert walk.batch is not None
    shape = [walk.batch.size, heads, b.size(value.handle, value.rank - 2), b.size(value.handle, value.rank - 1)]
    return b.reshape(value.handle, shape)


def _canonical_probs(walk: Walk, value: Value, space: TokenSpace) -> Any:
    b = walk.builder
    if any(s is not space for s in value.spaces):
        walk.ctx.fail(
            "the attention probabilities of an earlier layer are over other tokens",
            help="score from the layer's own attention",
        )
    if value.rank == 4:
        return value.handle
    assert walk.batch is not None
    heads: Any = 1
    for factor in [f for axis in value.axes[:-2] for f in axis][1:]:
        heads = heads * factor.old
    tail = [b.size(value.handle, value.rank - 2), b.size(value.handle, value.rank - 1)]
    return b.reshape(value.handle, [walk.batch.size, heads, *tail])


def _repeat_heads(walk: Walk, key: Any, groups: int) -> Any:
    b = walk.builder
    sizes = [b.size(key, i) for i in range(4)]
    wide = b.expand(b.unsqueeze(key, 2), [sizes[0], sizes[1], groups, sizes[2], sizes[3]])
    return b.reshape(wide, [sizes[0], sizes[1] * groups, sizes[2], sizes[3]])


def _mask(walk: Walk, mask: Value, space: TokenSpace) -> Any:
    """Bring a mask to ``[B or 1, H or 1, N or 1, N]`` in the current space."""
    ctx = walk.ctx
    assert walk.batch is not None
    mask = ctx.pad_rank(mask, 4)
    root = space.root
    axes = list(mask.axes)
    if axes[0]:
        axes[0] = (Factor(walk.batch, walk.batch.old),)
    for axis in (2, 3):
        if axes[axis] and not any(f.space is not None for f in axes[axis]):
            axes[axis] = (Factor(root, root.old),)
    mask = mask.having(axes=tuple(axes))
    batch = (0, (Factor(walk.batch, walk.batch.old),))
    for axis in (2, 3):
        if mask.axes[axis] and mask.axes[axis][0].space is not space:
            mask = ctx.remap(mask, axis, 0, space, batch)
    return mask.handle
