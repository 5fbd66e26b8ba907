"""Attention to the caches of a decoder that is rebuilt: what one layer reads, attends to and leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.rotation import Rotation
from tokcc.ir.builder import GraphBuilder
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.program import Program
from tokcc.passes.cache.beside import Beside
from tokcc.passes.cache.biasing import biased
from tokcc.passes.cache.cut import CacheCut, behind
from tokcc.passes.cache.plan import WEIGHT, CachePlan, HeadGroup, PlannedEviction
from tokcc.passes.cache.runs import prefix, run_from
from tokcc.passes.cache.storage import Left
from tokcc.passes.cache.visible import places_in_text, real_slots
from tokcc.passes.cache.weighing import front_row, slot_weights
from tokcc.passes.prompt.stream import PromptStream
from tokcc.passes.sparse.attend import attend_sparsely
from tokcc.passes.sparse.cut import BlockList, Indexed, SparseCut
from tokcc.passes.sparse.entering import in_order
from tokcc.passes.sparse.plan import PlannedSparse
from tokcc.passes.sparse.remembering import Entering, held_whole, with_new_tokens, with_what_stays

__all__ = ["ATTEND", "CacheAttention"]

aten = torch.ops.aten

ATTEND = "attend"
"""Label of an attention that is written out, before `@` and its layer."""


class CacheAttention:
    """Writes the attention of layers into a new graph.

    Args:
        program: The decoder.
        plan: What to do.

    Attributes:
        b: Writes the graph.
        nodes: The decoder's nodes by name.
        env: What has taken their place so far.
        groups: The groups of heads of each layer.
        tensors: What travels into a call, by public name.
        left: What travels out of it, by public name.
        sizes: Sizes that layers have in common, one node each.
        lists: What sparse layers have chosen.
        unmerge: How several tokens read one row of the stream, or None.
        prompt: The walk over a prompt that gets shorter, or None.
        ids: The call's tokens, or None.
        beside: Tokens that are read beside the call's own, or None.
    """

    def __init__(self, program: Program, plan: CachePlan) -> None:
        self.program, self.plan = program, plan
        self.b = GraphBuilder(fake_mode_of(program))
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.env: dict[fx.Node, Any] = {}
        self.groups = {site.layer: plan.groups(site.layer) for site in plan.sites}
        self.tensors: dict[str, fx.Node] = {}
        self.left: dict[str, Any] = {}
        self.sizes: dict[tuple[Any, ...], Any] = {}
        self.lists: dict[int, BlockList] = {}
        self.unmerge = None if plan.prompt is None else plan.prompt.unmerge
        self.prompt: PromptStream | None = None
        self.ids: Any = None
        self.beside: Beside | None = None

    def operands(self, site: CacheSite) -> list[fx.Node]:
        """Return what the attention of a layer reads: what is turned again is read before it is turned, too."""
        if self.unmerge is not None:
            return [self.nodes[site.new_value], *self.unmerge.reads(site.layer)]
        operands = [self.nodes[name] for name in (site.query, site.new_key, site.new_value)]
        for group in self.groups[site.layer]:
            ahead = group.eviction.turn if group.eviction else None
            sparse = [r for one in self._sparse_of(group) for r in one.rotations or ()]
            for rotation in (*(group.rotations or ()), *sparse, *([ahead] if ahead else ())):
                operands += [rotation.source, rotation.positions, *rotation.outside]
        if site.index is not None:
            operands += [self.nodes[name] for name in (site.index.new, site.index.query, site.index.gate)]
        if site.layer in self.plan.key_biases:
            operands += self.plan.key_biases[site.layer].outside
        return operands

    def attend(self, site: CacheSite) -> Any:
        """Attend with all groups of heads of a layer."""
        b, groups = self.b, self.groups[site.layer]
        outs = [self._attend_group(site, group) for group in groups]
        if len(outs) == 1:
            return outs[0]
        joined = b.cat(outs, 1)
        size = int(b.shape(joined)[1])
        per_head = size // sum(len(group.heads) for group in groups)
        order = [head * per_head + i for group in groups for head in group.heads for i in range(per_head)]
        if order == sorted(order):
            return joined
        back = torch.tensor([order.index(head) for head in range(size)])
        return b.call(aten.index_select.default, joined, 1, b.constant(f"head_order_{site.layer}", back))

    def _heads(self, x: Any, group: HeadGroup, kv_heads: int) -> Any:
        """Take the group's heads of ``[B, H or Hkv, ...]``."""
        if len(group.heads) == kv_heads:
            return x
        b = self.b
        per_head = int(b.shape(x)[1]) // kv_heads
        order = [head * per_head + i for head in group.heads for i in range(per_head)]
        if order == list(range(order[0], order[-1] + 1)):
            return b.slice(x, 1, order[0], order[-1] + 1)
        name = f"heads_{group.layer}_{group.number}_{per_head}"
        return b.call(aten.index_select.default, x, 1, b.constant(name, torch.tensor(order)))

    def _asked(self, site: CacheSite) -> list[Any]:
        """Return the queries, new keys and new values of a layer, of all tokens of the call."""
        if self.unmerge is not None and self.prompt is not None and self.prompt.unmerged is not None:
            with self.b.inserting(f"unmerge@{site.layer}"):
                value = self.env[self.nodes[site.new_value]]
                return self.prompt.unmerged.asked(self.b, self.unmerge.turns[site.layer], value, self.env)
        return [self.env[self.nodes[name]] for name in (site.query, site.new_key, site.new_value)]

    def _attend_group(self, site: CacheSite, group: HeadGroup) -> Any:
        b, eviction = self.b, group.eviction
        kv_heads = self.plan.forms[site.layer].kv_heads
        query, new_key, new_value = (self._heads(x, group, kv_heads) for x in self._asked(site))
        rotations = group.rotations
        if rotations is not None:
            query, new_key = (self._heads(self.env[r.source], group, kv_heads) for r in rotations)
        tensors: dict[str, Any] = {
            stored.name: self.tensors[group.name(stored.name)] for stored in group.storage.tensors(group.form)
        }
        with b.inserting(f"read@{site.layer}"):
            held = group.storage.read(b, group.form, tensors)
        basis = group.storage.basis(group.form)
        if basis is not None:
            query, new_key = (self._times(x, basis[0]) for x in (query, new_key))
            new_value = self._times(new_value, basis[1])
        refill = self.prompt.refill if self.prompt is not None and group.refilled else None
        if refill is not None:
            with b.inserting(f"refill@{site.layer}"):
                new_key, new_value = refill.filled(b, site.layer, new_key, new_value, self.env)
        before = [held.key, held.value]
        front = None if held.front is None else front_row(b, held.front)
        if front is not None:
            before = [b.cat([front.key, held.key], 2), b.cat([front.value, held.value], 2)]
        # One node for one size, so that layers of equal length share their masks.
        mask = None if self.plan.attention_mask is None else self.env[self.nodes[self.plan.attention_mask]]
        new = self.sizes.setdefault(("new", group.stage), b.size(query, 2))
        buffers = None
        if group.storage.in_place:
            # The mask tells how many slots are filled.
            past = self.sizes.setdefault((group.length, "past"), b.sub_sizes(b.size(mask, 1), new))
            total = b.size(mask, 1)
        else:
            slots = b.add_sizes(b.size(held.key, 2), int(front is not None))
            past = self.sizes.setdefault((group.length, "past"), slots)
            total = b.add_sizes(past, new)
        real = real_slots(b, mask, past, new, query, **(self._shortened(group) if group.stage else {}))
        if held.real is not None:
            real = b.cat([held.real, b.slice(real, 1, past, None)], 1)
        entering = [new_key, new_value]
        ordering = None if group.sparse is None else group.sparse.ordering
        if ordering is not None:
            with b.inserting(f"order@{site.layer}"):
                entering = in_order(b, ordering, (new_key, new_value), real, past, total)
        if group.storage.in_place:
            with b.inserting(f"write@{site.layer}"):
                buffers = group.storage.entered(b, held, entering[0], entering[1], past, new)
            key, value = (prefix(b, x, 2, total) for x in buffers)
        else:
            key, value = (b.cat([x, y], 2) for x, y in zip(before, entering, strict=True))
        stored_key = key
        arranged = None
        if rotations is not None:
            if held.arranged is None:
                place = places_in_text(b, real)  # [B, L]
            else:
                fresh = run_from(b, real, 1, past, new)
                arranged = group.storage.arranged(b, held, self.env[rotations[0].positions], fresh)
                place = arranged.places
            query = rotations[0].replay(b.call, query, b.slice(place, 1, past, None), self.env)
            key = rotations[1].replay(b.call, key, place, self.env)
        weight, bias = slot_weights(b, held, front, query)
        with b.inserting(f"bias@{site.layer}"):
            bias = biased(b, bias, group, real)
        steps = [(one, self._before_turns(one, group, kv_heads)) for one in self._sparse_of(group)]
        pages: dict[str, Any] = {}
        if group.form.pages:
            with b.inserting(f"pages@{site.layer}"):
                own = self._bias_of(site, new_value) if site.layer in self.plan.key_biases else None
                held_key = key if buffers is None else buffers[0]
                asked = query if any(piece.wants_queries for one, _ in steps for piece in one.pieces) else None
                index = None if site.index is None else self.env[self.nodes[site.index.new]]
                call = Entering(held_key, entering[0], real, past, new, total, self.ids, own, asked, index)
                for planned, before_turns in steps:
                    turn = before_turns["turns"][1] if before_turns else None
                    pages |= with_new_tokens(b, planned, group.form, group.storage, tensors, call, turn)
        added = self._key_bias(site, group, pages, value, total)
        if added is not None:  # beside nothing else: entries stand for one token each where a model adds a bias
            bias = added
        out = received = None
        if arranged is None and refill is None:
            op = torch.ops.tokcc.cached_attention.default
            extra = () if bias is None else (bias,)
            seen = [key, value]
            if ordering is not None:  # a text's tokens see those in front of them
                earlier = [prefix(b, x, 2, past) for x in buffers or before]
                seen = [b.cat([x, y], 2) for x, y in zip(earlier, (new_key, new_value), strict=True)]
            both = b.call(op, query, *seen, real, group.window, site.scale, site.softcap, *extra)
            out, received = b.parts(both, 2)
        for planned, before_turns in steps:
            earlier_text = held_whole(b, planned, group.form, group.storage, tensors)
            whole = SparseCut(b, site.layer, len(self.plan.sites), query, key, value, real, past, new, total,
                              site.scale, site.softcap, planned.block_q, planned.block_k, buffers, pages,
                              before=earlier_text, lists=self.lists, bias=added, indexed=self._indexed(site),
                              **before_turns)  # fmt: skip
            out = attend_sparsely(whole, planned, out)
        cut = CacheCut(
            b=b,
            layer=site.layer,
            num_layers=len(self.plan.sites),
            query=query,
            key=key,
            value=value,
            real=real,
            received=received,
            past=past,
            new=new,
            total=total,
            seen=total if mask is None else b.size(mask, 1),
            scale=site.scale,
            softcap=site.softcap,
            capacity=None,
            sinks=0 if eviction is None else eviction.sinks,
            recent=0 if eviction is None else eviction.recent,
            states=held.states,
            budget=None if eviction is None else eviction.capacity,
            weight=weight,
            bias=bias,
            ids=self.ids,
            window=group.window,
        )
        if self.beside is not None:
            with b.inserting(f"lookahead@{site.layer}"):
                cut, stored_key = self.beside.narrowed(cut, stored_key)
                new_key, new_value = (self.beside.own(b, x, 2) for x in (new_key, new_value))
                key, value, query, real = cut.key, cut.value, cut.query, cut.real
                new, total = cut.new, cut.total
        if arranged is not None:
            with b.inserting(f"{ATTEND}@{site.layer}"):
                out = cut.attended(arranged.allowed)
        if refill is not None:
            with b.inserting(f"{ATTEND}@{site.layer}"):
                own = refill.slots(b, past)
                out = cut.attended(refill.allowed(b, cut.slots(), own, real), own)
        left = Left(stored_key, value, held.states, new_key, new_value, real, past, new, cut=cut, arranged=arranged,
                    pages=pages)  # fmt: skip
        if buffers is not None:
            left = replace(left, key=buffers[0], value=buffers[1])
        if group.rating is not None:
            with b.inserting(f"rate@{site.layer}"):
                left = replace(left, rating=group.rating.emit(cut))
        if eviction is not None:
            with b.inserting(f"{eviction.name}@{site.layer}"):
                cut = replace(cut, **self._looking_ahead(eviction, group, kv_heads, query))
                left = self._evict(eviction, cut, stored_key, left, group.storage.always())
            if pages:
                with b.inserting(f"pages@{site.layer}"):
                    stays = {k: v for one, _ in steps for k, v in with_what_stays(b, one, group.form, left).items()}
                    left = replace(left, pages=stays)
        elif group.window and buffers is None:
            # A query sees window - 1 earlier tokens: nothing else is ever read again.
            start = b.max_sizes(b.sub_sizes(total, group.storage.always() or group.window - 1), 0)
            key, value = (b.slice(x, 2, start, None) for x in (stored_key, value))
            left = replace(left, key=key, value=value, start=start)
        with b.inserting(f"write@{site.layer}"):
            written = group.storage.write(b, group.form, tensors, left)
        for stored in group.storage.tensors(group.form):
            self.left[group.name(stored.name, "present")] = written[stored.name]
        return out if basis is None else self._times(out, basis[1].T)

    def _shortened(self, group: HeadGroup) -> dict[str, Any]:
        """Return what tells padding where a layer sees only some tokens of the call."""
        assert self.prompt is not None
        return {"call": self.prompt.call_size, "fresh": self.prompt.facts["real"], "gone": self.prompt.gone}

    def _times(self, x: Any, matrix: torch.Tensor) -> Any:
        """Multiply ``[B, heads, S, D]`` by a constant ``[D, D]``."""
        weight = self.b.constant("basis", matrix.T.contiguous().to(self.b.dtype(x)))
        return self.b.call(aten.linear.default, x, weight)

    def _indexed(self, site: CacheSite) -> Indexed | None:
        """Return what the layer's indexer compares the call's queries by."""
        if site.index is None:
            return None
        query, gate = (self.env[self.nodes[name]] for name in (site.index.query, site.index.gate))
        return Indexed(self.b.transpose(query, 1, 2), self.b.permute(gate, [0, 3, 1, 2]), site.index.scale)

    @staticmethod
    def _sparse_of(group: HeadGroup) -> tuple[PlannedSparse, ...]:
        """Return what the calls of a layer read."""
        return () if group.sparse is None else group.sparse.each

    def _key_bias(self, site: CacheSite, group: HeadGroup, pages: dict[str, Any], value: Any, total: Any) -> Any:
        """Return what the layer itself adds to the logits of keys, ``[B, Hkv, L]``, or None."""
        if site.layer not in self.plan.key_biases:
            return None
        with self.b.inserting(f"bias@{site.layer}"):
            for planned in self._sparse_of(group):
                name = None if planned.score is None else planned.score.bias_state
                if name is not None:
                    return self.b.squeeze(prefix(self.b, pages[name], 2, total), 3)
            return self._bias_of(site, value)

    def _bias_of(self, site: CacheSite, values: Any) -> Any:
        return self.plan.key_biases[site.layer].replay(self.b.call, self.b.size, values, self.env)

    def _before_turns(self, planned: PlannedSparse, group: HeadGroup, kv_heads: int) -> dict[str, Any]:
        """Return what sparse pieces need that read queries and keys before they are turned."""
        rotations = planned.rotations
        if rotations is None:
            return {}

        def turn(rotation: Rotation) -> Any:
            return lambda x, positions: rotation.replay(self.b.call, x, positions, self.env)

        unturned = self._heads(self.env[rotations[0].source], group, kv_heads)
        return {"unturned": unturned, "turns": (turn(rotations[0]), turn(rotations[1]))}

    def _looking_ahead(self, eviction: PlannedEviction, group: HeadGroup, kv_heads: int, query: Any) -> dict[str, Any]:
        """Return what scores need that turn queries themselves."""
        if not eviction.score.looks_ahead:
            return {}
        rotation = eviction.turn
        if rotation is None:
            return {"unturned": query}
        unturned, positions = self._heads(self.env[rotation.source], group, kv_heads), self.env[rotation.positions]
        if self.beside is not None:
            unturned, positions = self.beside.own(self.b, unturned, 2), self.beside.own(self.b, positions, 1)
        return {
            "unturned": unturned,
            "positions": positions,
            "turn": lambda x, positions: rotation.replay(self.b.call, x, positions, self.env),
        }

    def _evict(self, eviction: PlannedEviction, cut: CacheCut, stored_key: Any, left: Left, always: int | None) -> Left:
        """Let the pieces of an eviction work; an entry in front is for the reducer alone."""
        b = self.b
        whole = replace(cut, key=stored_key)
        if eviction.reduce.fronted:
            cut = behind(cut, 1)
        # A storage of fixed length has as many from the first call on.
        cut.capacity = whole.capacity = eviction.slots(cut) if always is None else always
        if eviction.score.once:
            cut.decides = whole.decides = cut.is_text()
        score = eviction.score.emit(cut)
        retained = eviction.select.select(cut, score)
        made = eviction.reduce.reduce(whole, retained)
        states = {}
        for name in eviction.score.states:
            states[name] = b.call(torch.ops.tokcc.gather_slots.default, cut.left[name], retained.index)
        if eviction.weighted:
            weight = retained.weight if made.weight is None else made.weight
            assert weight is not None, "a weighted piece gives no weight"
            states[WEIGHT] = weight
        return replace(left, key=made.key, value=made.value, states=states, index=retained.index, front=made.front)
