"""The operations of reduced graphs as the plugins take them: arguments, types and sizes as passes write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

from tests.decoders.tiny import program_of
from tests.sparse.engine import policy
from tests.zoo import ZOO
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import LoweringError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.methods import library
from tokcc.plugins_trt import Operand, Plugin, PluginUse, plugin_for
from tokcc.testing import reduce_program, trace

SLOTS = 96


def calls(module: fx.GraphModule | fx.Graph) -> Iterator[tuple[Plugin, fx.Node]]:
    """The nodes that a plugin stands for, also those in branches."""
    graph = module if isinstance(module, fx.Graph) else module.graph
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            plugin = plugin_for(f"{node.target.namespace}::{node.target._opname}")
            if plugin is not None:
                yield plugin, node


def use(plugin: Plugin, node: fx.Node) -> PluginUse:
    """As a lowering asks: 64-bit lists are cast first."""
    call = plugin.arguments(*node.args, **node.kwargs)
    operands: dict[str, Operand | None] = {}
    for name, argument in call.inputs.items():
        if argument is None:
            operands[name] = None
        else:
            value = argument.meta["val"]
            operands[name] = Operand(plugin.wanted(name) or value.dtype, tuple(value.shape))
    return plugin.takes(operands, call.attributes, node=node.name)


def decoder(given: dict[str, Any]) -> fx.Graph:
    program = program_of("llama")
    plan = make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))
    return RebuildCaches(plan).run(program).program.graph


def test_tokens_are_merged() -> None:
    entry = ZOO["vit_classifier"]
    program, _ = reduce_program(trace(entry.build(), entry.inputs(3), entry.dynamic_shapes()), "tome")
    found = [use(plugin, node) for plugin, node in calls(program.graph)]
    assert Counter(each.op for each in found).keys() == {"merge_tokens"}
    (width,) = {each.attributes["channels"] for each in found}
    values = [node.args[0].meta["val"] for _, node in calls(program.graph)]
    assert {value.shape[2] for value in values} == {width}
    assert not any(isinstance(value.shape[0], int) for value in values)  # a dynamic batch


def test_slots_are_written() -> None:
    slots = {"version": 1, "name": "p", "steps": [], "kv": {"layout": "slots", "tokens": SLOTS}}
    found = [use(plugin, node) for plugin, node in calls(decoder(slots)) if plugin.op == "kv_update"]
    layers = len(cache_sites(program_of("llama")))
    assert layers > 1
    assert len(found) == 2 * layers  # keys and values
    assert {tuple(each.attributes) for each in found} == {("width",)}


def test_prompts_attend_within_lists() -> None:
    wanted = policy("xattention", block=4, key_block=4, length=0, stride=2, mass=0.6)
    found = [(plugin, node) for plugin, node in calls(decoder(wanted)) if plugin.op == "block_sparse_attention"]
    assert found
    for plugin, node in found:
        made = use(plugin, node)
        assert (made.attributes["block_q"], made.attributes["causal"]) == (4, 1)
        with pytest.raises(LoweringError, match=node.name):
            plugin.takes({}, {}, node=node.name)
