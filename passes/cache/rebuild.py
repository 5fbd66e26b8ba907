"""Rebuild a decoder around its caches: attention by slot, bounded windows, eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.rotation import Rotation
from tokcc.ir.builder import GraphBuilder
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.program import PassResult, Program
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.visible import real_slots, slot_rank
from tokcc.passes.outputs import OutputPlan
from tokcc.passes.propagate import finish

__all__ = ["RebuildCaches"]

aten = torch.ops.aten


@dataclass(frozen=True)
class RebuildCaches:
    """Replace every cached attention by ``tokcc::cached_attention`` and let the plan's evictions follow it.

    The model builds one mask and one repetition of keys for all layers from the length of the first cache. Here each
    layer reads its own slots, so that lengths may differ; the model's masks are no longer needed and go.

    Attributes:
        plan: What to do.
    """

    plan: CachePlan

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        if not self.plan.sites:
            return PassResult(program, False)
        rebuilt = _Rebuild(program, self.plan)
        return PassResult(rebuilt.run(), True)


class _Rebuild:
    """One run of the pass."""

    def __init__(self, program: Program, plan: CachePlan) -> None:
        self.program, self.plan = program, plan
        self.b = GraphBuilder(fake_mode_of(program))
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.env: dict[fx.Node, Any] = {}
        self.by_output = {site.output: site for site in plan.sites}
        self.made: dict[int, Any] = {}  # output position -> handle
        self.states: dict[tuple[int, str], fx.Node] = {}
        self._sizes: dict[Any, Any] = {}
        self.left: dict[str, Any] = {}  # public name -> handle

    def run(self) -> Program:
        """Copy what the outputs need, with the caches' attention in its new form."""
        names = {
            name: f"past_key_values.{site.layer}.{part}"
            for site in self.plan.sites
            for part, name in (("key", site.past_key), ("value", site.past_value))
        }
        inputs = self._inputs(names)
        for node in self._needed():
            site = self.by_output.get(node.name)
            if site is not None:
                self.b.scope = node
                self.env[node] = self._attend(site)
            elif node.op == "call_function":
                operands: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
                args, kwargs = operands
                self.b.scope = node
                self.env[node] = self.b.call(node.target, *args, **kwargs)
        values = []
        for position, value in enumerate(self.program.output_values):
            handle = self.made.get(position)
            values.append(self.env[value] if handle is None else handle)
        values += self.left.values()
        outputs = OutputPlan((*self._output_names(), *self.left), (), values=tuple(values))
        return finish(self.program, self.b, outputs, inputs=inputs, input_names=names)

    def _inputs(self, names: dict[str, str]) -> list[InputSpec]:
        """Copy the placeholders, each cache with a length of its own, and add those of the states."""
        lengths = {name: self._length(site) for site in self.plan.sites for name in (site.past_key, site.past_value)}
        sizes: dict[Any, Any] = {}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            copied = self.env[node] = self.b.placeholder(node)
            if node.name not in lengths:
                continue
            fake, length = copied.meta["val"], lengths[node.name]
            if length not in sizes:
                sizes[length] = self.b.free_size(int(fake.shape[2].node.hint)) if sizes else fake.shape[2]
            shape = list(fake.shape)
            shape[2] = sizes[length]
            with self.b.fake_mode:
                copied.meta["val"] = torch.empty(shape, dtype=fake.dtype, device=fake.device)
        specs = []
        for layer, eviction in self.plan.evictions.items():
            site = self.plan.sites[layer]
            past = self.env[self.nodes[site.past_key]]
            for state in eviction.score.states:
                fake = past.meta["val"]
                with self.b.fake_mode:
                    value = torch.empty([*fake.shape[:3], 1], dtype=torch.float32, device=fake.device)
                name = f"{site.past_key}_{state}"
                node = self.b.graph.create_node("placeholder", name, name=name)
                node.meta["val"] = value
                self.states[layer, state] = node
                names[node.name] = f"past_key_values.{layer}.{state}"
                specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), None))
        return specs

    def _output_names(self) -> list[str]:
        """Name the caches as the community does; positions count user outputs."""
        names = list(self.program.output_names)
        places = {position: i for i, position in enumerate(self.program.user_output_positions)}
        for site in self.plan.sites:
            for part, position in (("key", site.present_key), ("value", site.present_value)):
                names[places[position]] = f"present.{site.layer}.{part}"
        return names

    def _length(self, site: CacheSite) -> Any:
        """Return what the length of a layer's cache depends on: layers that keep as much have one length."""
        eviction = self.plan.evictions.get(site.layer)
        return self.plan.windows[site.layer], eviction and eviction.length

    def _needed(self) -> list[fx.Node]:
        """Return the nodes that the outputs need when attention reads only queries and new keys and values."""
        needed: set[fx.Node] = set()
        caches = {position for site in self.plan.sites for position in (site.present_key, site.present_value)}
        outputs = [v for i, v in enumerate(self.program.output_values) if i not in caches]
        work = [value for value in outputs if isinstance(value, fx.Node)]
        work += [self.nodes[site.output] for site in self.plan.sites]
        while work:
            node = work.pop()
            if node in needed:
                continue
            needed.add(node)
            site = self.by_output.get(node.name)
            work += node.all_input_nodes if site is None else self._operands(site)
        return [node for node in self.program.graph.nodes if node in needed]

    def _rotations(self, site: CacheSite) -> tuple[Rotation, Rotation] | None:
        eviction = self.plan.evictions.get(site.layer)
        return None if eviction is None else eviction.rotations

    def _operands(self, site: CacheSite) -> list[fx.Node]:
        """Return what the attention of a layer reads: unrotated queries and keys where it turns them itself."""
        rotations = self._rotations(site)
        query, key, value = (self.nodes[name] for name in (site.query, site.new_key, site.new_value))
        if rotations is None:
            return [query, key, value]
        outside = [node for rotation in rotations for node in rotation.outside]
        return [rotations[0].source, rotations[1].source, value, *outside]

    def _attend(self, site: CacheSite) -> Any:
        b, layer = self.b, site.layer
        query, new_key, new_value = (self.env[node] for node in self._operands(site)[:3])
        past_key, past_value = (self.env[self.nodes[name]] for name in (site.past_key, site.past_value))
        # One node for one size, so that layers of equal length share their masks.
        past = self._sizes.setdefault(self._length(site), b.size(past_key, 2))
        new = self._sizes.setdefault("new", b.size(query, 2))
        total = b.add_sizes(past, new)
        key, value = b.cat([past_key, new_key], 2), b.cat([past_value, new_value], 2)
        mask = None if self.plan.attention_mask is None else self.env[self.nodes[self.plan.attention_mask]]
        real = real_slots(b, mask, past, new, query)
        window = self.plan.windows[layer]
        stored, rotations = key, self._rotations(site)
        if rotations is not None:
            place = b.call(aten.clamp_min.default, slot_rank(b, real), 0)  # [B, L]
            query = rotations[0].replay(b.call, query, b.slice(place, 1, past, None), self.env)
            key = rotations[1].replay(b.call, key, place, self.env)
        op = torch.ops.tokcc.cached_attention.default
        both = b.call(op, query, key, value, real, window, site.scale, site.softcap)
        out, received = b.parts(both, 2)
        eviction = self.plan.evictions.get(layer)
        if eviction is not None:
            with b.inserting(f"{eviction.name}@{layer}"):
                seen = total if mask is None else b.size(mask, 1)
                cut = CacheCut(
                    b=b,
                    layer=layer,
                    num_layers=len(self.plan.sites),
                    query=query,
                    key=key,
                    value=value,
                    real=real,
                    received=received,
                    past=past,
                    new=new,
                    total=total,
                    seen=seen,
                    scale=site.scale,
                    softcap=site.softcap,
                    capacity=None,
                    sinks=eviction.sinks,
                    recent=eviction.recent,
                    # Not a squeeze: runtimes start with no slots of any width (tokcc.backends.onnx frees it).
                    states={s: b.call(aten.select.int, self.states[layer, s], 3, 0) for s in eviction.score.states},
                )
                cut.capacity = _capacity(cut, eviction)
                score = eviction.score.emit(cut)
                retained = eviction.select.select(cut, score)
                cut.key = stored
                key, value = eviction.reduce.reduce(cut, retained)
                self._leave(site, cut, retained.index)
        elif window:
            # A query sees window - 1 earlier tokens: nothing else is ever read again.
            start = b.max_sizes(b.sub_sizes(total, window - 1), 0)
            key, value = (b.slice(x, 2, start, None) for x in (key, value))
        self.made[site.present_key], self.made[site.present_value] = key, value
        return out

    def _leave(self, site: CacheSite, cut: CacheCut, index: Any) -> None:
        # In the order of the inputs: runtimes pair inputs and outputs by their order.
        for state in self.plan.evictions[site.layer].score.states:
            kept = cut.b.call(torch.ops.tokcc.gather_slots.default, cut.left[state], index)
            self.left[f"present.{site.layer}.{state}"] = cut.b.unsqueeze(kept, 3)


def _capacity(cut: CacheCut, eviction: Any) -> Any:
    """Slots that stay."""
    b = cut.b
    kept = eviction.select.capacity(cut, eviction.capacity)
    if eviction.score.once:
        # A single token of a running generation is appended: 2 - S is 1 then, and 0 for a prompt.
        single = b.max_sizes(b.sub_sizes(2, cut.new), 0)
        kept = b.add_sizes(kept, b.mul_sizes(single, 2**31))
    return b.min_sizes(kept, cut.total)
