"""Rebuild a decoder around its caches: attention by slot, bounded windows, eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from tokcc.analysis.cache_sites import CacheSite
from tokcc.capture.hf_decoder import INDEX
from tokcc.ir.program import PassResult, Program
from tokcc.passes.cache.attending import ATTEND, CacheAttention
from tokcc.passes.cache.beside import TOKENS, Beside
from tokcc.passes.cache.plan import CachePlan, HeadGroup
from tokcc.passes.cache.storage import Stored
from tokcc.passes.outputs import OutputPlan
from tokcc.passes.prompt.reduction import prompt_actions
from tokcc.passes.prompt.stream import PromptStream
from tokcc.passes.prompt.unmerging import share_rows
from tokcc.passes.propagate import finish

__all__ = ["ATTEND", "RebuildCaches"]


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


def _own(site: CacheSite) -> dict[str, tuple[str, int]]:
    """Return the input and the place of the output of what a layer of the model itself caches, by name."""
    own = {"key": (site.past_key, site.present_key), "value": (site.past_value, site.present_value)}
    return own if site.index is None else {**own, INDEX: (site.index.past, site.index.present)}


class _Rebuild(CacheAttention):
    """One run of the pass."""

    def __init__(self, program: Program, plan: CachePlan) -> None:
        super().__init__(program, plan)
        self.by_output = {site.output: site for site in plan.sites}
        self.named: dict[str, str] = {}  # placeholder -> public name
        self.prompt = self._prompt_stream()

    def run(self) -> Program:
        """Copy what the outputs need, with the caches' attention in its new form."""
        specs = self._inputs()
        self.ids = next((self.env[n] for n in self.program.user_inputs if self.program.public_name(n) == TOKENS), None)
        if self.plan.reads_beside:
            self.beside = Beside.of(self.b, self.program, self.plan.attention_mask, self.env)
            self.env |= self.beside.joined
        for node in self._needed():
            site = self.by_output.get(node.name)
            if site is not None:
                self.b.scope = node
                self.env[node] = self.attend(site)
                if self.prompt is not None:
                    if self.prompt.unmerged is not None:
                        with self.b.inserting(f"unmerge@{site.layer}"):
                            self.env[node] = self.prompt.unmerged.merged(self.b, self.env[node])
                    self.prompt.attended(site, self.env[node])
            elif node.op == "call_function" and self.prompt is not None:
                self.b.scope = node
                self.env[node] = self.prompt.visit(node)
            elif node.op == "call_function":
                self.b.scope = node
                reader = node
                operands: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: self._read(n, reader))  # noqa: B023
                args, kwargs = operands
                self.env[node] = self.b.call(node.target, *args, **kwargs)
        values, names = [], []
        pairs = self._pairs()
        places = {position: i for i, position in enumerate(self.program.user_output_positions)}
        for position, value in enumerate(self.program.output_values):
            public = pairs.get(position)
            if public is not None:
                values.append(self.left.pop(public))
            elif self.prompt is not None and position not in self.plan.last_token_outputs:
                values.append(self.prompt.whole(value))
            else:
                values.append(self._read(value, self.program.output_node))
            if position in places:
                names.append(self.program.output_names[places[position]] if public is None else public)
        # In the order of the inputs: runtimes pair inputs and outputs by their order.
        values += self.left.values()
        outputs = OutputPlan((*names, *self.left), (), values=tuple(values))
        return finish(self.program, self.b, outputs, inputs=specs, input_names=self.named)

    def _prompt_stream(self) -> PromptStream | None:
        """Return the walk that copies nodes where the prompt gets shorter between layers."""
        plan = self.plan
        if plan.prompt is None or plan.attention_mask is None:
            return None
        outputs = set(range(len(self.program.output_values))) - set(self._pairs()) - set(plan.last_token_outputs)
        actions = prompt_actions(plan.prompt, restored=bool(outputs))
        return PromptStream(self.program, self.b, plan.prompt, actions, plan.sites, plan.attention_mask)

    def _read(self, node: fx.Node, reader: fx.Node) -> Any:
        """Return what a node reads; the heads of outputs know nothing of tokens that are read beside."""
        handle = self.env[node]
        if self.beside is None or self.beside.reads.get(reader) is not node:
            return handle
        return self.beside.own(self.b, handle, 1)

    def _pairs(self) -> dict[int, str]:
        """Return what takes the place of the model's own cache outputs: what the first group holds of that name."""
        return {
            position: self.groups[site.layer][0].name(part, "present")
            for site in self.plan.sites
            for part, (_, position) in _own(site).items()
        }

    def _inputs(self) -> list[InputSpec]:
        """Copy the placeholders, each cache with a length of its own, and add those of what travels besides."""
        caches = {
            name: (self.groups[site.layer][0], part)
            for site in self.plan.sites
            for part, (name, _) in _own(site).items()
        }
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            copied = self.env[node] = self.b.placeholder(node)
            if node.name in caches:
                group, part = caches[node.name]
                stored = next(item for item in group.storage.tensors(group.form) if item.name == part)
                copied.meta["val"] = self._empty(group, stored, copied.meta["val"])
                self._register(group, part, copied)
            if self.prompt is not None:
                self.prompt.hold(node, copied)
        specs = []
        for site in self.plan.sites:
            like = self.env[self.nodes[site.past_key]].meta["val"]
            for group in self.groups[site.layer]:
                for stored in group.storage.tensors(group.form):
                    if group.name(stored.name) in self.tensors:
                        continue
                    name = f"{site.past_key}_{stored.name}" + (f"_{group.number}" if group.number else "")
                    node = self.b.graph.create_node("placeholder", name, name=name)
                    node.meta["val"] = self._empty(group, stored, like)
                    self._register(group, stored.name, node)
                    specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), None))
        if self.unmerge is not None:
            share_rows(self.b, [self.env[self.nodes[name]] for name in self.unmerge.tokens])
        if self.prompt is not None:
            self.prompt.begin()
        return specs

    def _register(self, group: HeadGroup, part: str, node: fx.Node) -> None:
        self.tensors[group.name(part)] = node
        self.named[node.name] = group.name(part)

    def _empty(self, group: HeadGroup, stored: Stored, like: torch.Tensor) -> torch.Tensor:
        """Return the fake of a tensor that travels: one symbol for one length."""
        rows: Any = stored.fixed
        if rows is None:
            key = (group.length, stored.rows, "rows")
            if key not in self.sizes:
                first = not any(word == "rows" for *_, word in self.sizes)
                length: Any = like.shape[2]
                # No two alike, and none so small that an arithmetic of lengths comes out as 0 or 1.
                hint = int(length.node.hint) + 997 * len(self.sizes)
                self.sizes[key] = length if first else self.b.free_size(hint)
            rows = self.sizes[key]
        shape = [like.shape[0], stored.heads, rows, stored.width]
        with self.b.fake_mode:
            return torch.empty(shape, dtype=stored.dtype, device=like.device)

    def _needed(self) -> list[fx.Node]:
        """Return the nodes that the outputs need when attention reads only queries and new keys and values."""
        needed: set[fx.Node] = set()
        caches = {position for site in self.plan.sites for _, position in _own(site).values()}
        outputs = [v for i, v in enumerate(self.program.output_values) if i not in caches]
        work = [value for value in outputs if isinstance(value, fx.Node)]
        work += [self.nodes[site.output] for site in self.plan.sites]
        while work:
            node = work.pop()
            if node in needed:
                continue
            needed.add(node)
            site = self.by_output.get(node.name)
            work += node.all_input_nodes if site is None else self.operands(site)
        return [node for node in self.program.graph.nodes if node in needed]
