"""The stream of a decoder while its prompt is made shorter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.walk import Action, Walk
from tokcc.ir.builder import Builder
from tokcc.ir.program import Program
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value, untagged
from tokcc.passes.prompt.plan import PromptPlan
from tokcc.passes.prompt.refill import Refill
from tokcc.passes.prompt.segments import belongs
from tokcc.passes.prompt.unmerge_plan import TOKEN_ASSIGN
from tokcc.passes.prompt.unmerging import Unmerged

__all__ = ["PromptStream"]

aten = torch.ops.aten


class PromptStream(Walk):
    """A forward walk in which every cached attention is made by somebody else.

    Args:
        program: The decoder.
        builder: Where to emit.
        plan: The reductions.
        actions: What to do at which node.
        sites: The caches by layer.
        attention_mask: Name of the padding mask.
    """

    def __init__(
        self,
        program: Program,
        builder: Builder,
        plan: PromptPlan,
        actions: Mapping[str, Sequence[Action]],
        sites: Sequence[CacheSite],
        attention_mask: str,
    ) -> None:
        super().__init__(program, builder, plan.cuts.entry, actions=actions)
        self.plan, self.sites = plan, tuple(sites)
        self._by_output = {self.nodes[site.output]: site for site in self.sites}
        self.facts: dict[str, Any] = {}
        """What is known of every token of the current stream, ``[B, N, ...]`` by name."""
        self.gone = 0
        """Real tokens of every prompt that have gone, where padding stays."""
        self.refill: Refill | None = None
        """What the caches of the layers behind a cut are filled up with."""
        self.unmerged: Unmerged | None = None
        """Which rows of the stream stand for which tokens, where attention runs over the tokens."""
        self.mask_name = attention_mask
        self._mask = self.nodes[attention_mask]
        self._positions = next((node for node in program.user_inputs if "position" in node.name), None)
        self._shared: dict[fx.Node, Value] = {}

    # the graph --------------------------------------------------------------------------------------------------------

    def hold(self, node: fx.Node, handle: Any) -> None:
        """Take in a placeholder."""
        value = node.meta.get("val")
        self.env[node] = untagged(handle, self.old_shape(node)) if isinstance(value, torch.Tensor) else handle

    def begin(self) -> None:
        """Go on from the placeholders: the stream may begin with one of them, and a cut there reads the others."""
        for node in list(self.env):
            self.ctx.node = node
            if isinstance(self.env[node], Value):
                self.env[node] = self._after(node, self.env[node])

    def visit(self, node: fx.Node) -> Any:
        """Emit a node in the form that its operands ask for, and return its handle."""
        self.ctx.node = node
        value = self._shared.pop(node, None)
        if value is None:
            value = self._call(node)
        elif isinstance(value, Value):
            value = self._current(value)
        value = self._after(node, value)
        self.env[node] = value
        return self.handle(node)

    def attended(self, site: CacheSite, handle: Any) -> None:
        """Take in what an attention returns, ``[B, H, S, Dv]``."""
        node = self.ctx.node = self.nodes[site.output]
        self.env[node] = self._after(node, self._of_heads(node, handle))

    def _of_heads(self, node: fx.Node, handle: Any) -> Value:
        """Return what an attention returns for the current tokens, ``[B, H, N, Dv]``, with its axes."""
        old = self.old_shape(node)
        assert self.batch is not None
        space = self.space
        axes = ((Factor(self.batch, old[0]),), (Factor(None, old[1]),), (Factor(space, space.root.old),))
        return Value(handle, (*axes, (Factor(None, old[3]),)), old)

    def handle(self, node: fx.Node) -> Any:
        """Return the handle of a node; of several results, the handles."""
        value = self.env[node]
        if isinstance(value, tuple):
            return tuple(item.handle if isinstance(item, Value) else item for item in value)
        return value.handle if isinstance(value, Value) else value

    def whole(self, node: fx.Node) -> Any:
        """Return a value of all tokens: those that are gone get what they had when they went."""
        value = self.env[node]
        if isinstance(value, Value) and value.reduced:
            self.ctx.node = node
            with self.builder.inserting("restore"):
                value = self.restored(value)
        return value.handle if isinstance(value, Value) else value

    def aligned(self, node: fx.Node) -> Value:
        """Return a value that was made before, for the tokens that are left."""
        value = self.env[node]
        assert isinstance(value, Value)
        return self._current(value)

    def _current(self, value: Value) -> Value:
        for axis, factors in enumerate(value.axes):
            for place, factor in enumerate(factors):
                if factor.space is not None and not factor.space.is_batch and factor.space is not self.space:
                    value = self.ctx.remap(value, axis, place, self.space, None)
        return value

    def _enter(self, value: Value) -> Value:
        """Take the stream for the call's tokens, or for rows that they share."""
        value = super()._enter(value)
        root, b = self.tokens, self.builder
        if self.plan.unmerge is None or root is None:
            return value
        assert self._positions is not None
        assert self.entry is not None
        rows, root.size = root.size, b.size(self.handle(self._positions), -1)
        self.look()
        with b.inserting("unmerge"):
            self.unmerged = Unmerged.of(b, self.input(TOKEN_ASSIGN.name, torch.int64), rows, self.facts["real"])
            self._space = self.unmerged.space(b, root)
        axes = list(value.axes)
        axes[self.entry.token_axis] = (Factor(self._space, root.old),)
        return value.having(axes=tuple(axes))

    def _pattern(self, node: fx.Node) -> fx.Node | None:
        # In front of the stream's entry rows are not as many as in the graph that was captured.
        return None if self.plan.unmerge is not None and self.tokens is None else super()._pattern(node)

    # the tokens -------------------------------------------------------------------------------------------------------

    _space: TokenSpace | None = None

    @property
    def space(self) -> TokenSpace:
        """The tokens of the current stream."""
        current = self._space or self.tokens
        assert current is not None
        return current

    def become(self, space: TokenSpace, removed: int | None) -> None:
        """Go on with fewer tokens."""
        b = self.builder
        for name, fact in self.facts.items():
            self.facts[name] = b.call(torch.ops.tokcc.gather_tokens.default, fact, space.index, 1, 0)
        self._space = space
        self.gone += removed or 0

    @property
    def call_size(self) -> Any:
        """S: tokens of the whole call."""
        assert self.tokens is not None
        return self.tokens.size

    @property
    def split(self) -> Any:
        """T - S: tokens of earlier calls."""
        return self.builder.sub_sizes(self.builder.size(self.handle(self._mask), 1), self.call_size)

    @property
    def first_call(self) -> Any:
        """A size: 1 in a call without past, else 0.

        Written with the lengths of mask and call: of the cache's own length a trace believes that it is at least 2.
        """
        return self.builder.sub_sizes(1, self.builder.min_sizes(self.split, 1))

    def look(self) -> None:
        """Find out what is padding and what may go, before the first cut."""
        if self.facts:
            return
        b, plan = self.builder, self.plan
        mask = b.slice(self.handle(self._mask), 1, self.split, None)
        real = self.facts["real"] = b.compare("gt", b.cast(mask, torch.int64), 0)
        if not plan.segments:
            return
        ids = next((self.handle(n) for n in self.program.user_inputs if self._is_token_ids(n)), None)
        masks: dict[str, Any] = {}
        if ids is None:
            for segment in plan.segments:
                if segment.start is None:
                    masks[segment.name] = self.input(segment.mask_input, torch.int64)
        self.facts["candidate"] = belongs(b, plan.segments, ids, masks, real)

    def _is_token_ids(self, node: fx.Node) -> bool:
        return self.program.public_name(node) == "input_ids"

    def input(self, name: str, dtype: torch.dtype) -> Any:
        """Return an input ``[B, S]`` beside the model's own."""
        b, mask = self.builder, self.handle(self._mask)
        return b.input(name, [b.size(mask, 0), self.call_size], dtype, b.device(mask))

    # beside the graph -------------------------------------------------------------------------------------------------

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node reads when it is rehearsed; an attention reads no cache."""
        site = self._by_output.get(node)
        if site is None:
            return super()._reads(node)
        return [self.nodes[name] for name in (site.query, site.new_key, site.new_value)]

    def _rehearsed(self, node: fx.Node) -> Any:
        """Emit a node that is rehearsed; an attention is over the current tokens alone."""
        site, b = self._by_output.get(node), self.builder
        if site is None:
            return super()._rehearsed(node)
        query, key, value = (self.aligned(operand).handle for operand in self._reads(node))
        op = torch.ops.tokcc.cached_attention.default
        both = b.call(op, query, key, value, self.facts["real"], 0, site.scale, site.softcap)
        return self._of_heads(node, b.parts(both, 2)[0])

    def share(self, node: fx.Node, value: Value) -> None:
        """Let a node that comes later be taken from what was made for a score already."""
        self._shared[node] = value

    def count_anew(self, place: Any) -> None:
        """Give the tokens of the current stream other positions, int64 ``[B, N]``, from here on."""
        assert self._positions is not None
        assert self.batch is not None
        node, space = self._positions, self.space
        old = self.old_shape(node)
        axes = ((Factor(self.batch, old[0]),), (Factor(space, space.root.old),))
        dtype = node.meta["val"].dtype
        self.env[node] = Value(self.builder.cast(place, dtype), axes, old, side=True)
        own = self.ctx.node
        for table in self._tables(node):
            self.ctx.node = table
            self.env[table] = self._call(table)
        self.ctx.node = own

    def _tables(self, positions: fx.Node) -> list[fx.Node]:
        """Return what was made from the positions alone so far: cosines and sines."""
        hidden = {node for node in self.program.user_inputs if node is not positions}
        behind = {positions}
        found = []
        for node in self.program.graph.nodes:
            if any(operand in hidden for operand in node.all_input_nodes):
                hidden.add(node)
            elif any(operand in behind for operand in node.all_input_nodes):
                behind.add(node)
                if node in self.env:
                    found.append(node)
        return found
