"""SinkLoRA at inference is H2O: the same graph, node by node."""

from __future__ import annotations

from typing import Any

import pytest

from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.ir.program import Program
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.methods import library


def graph(preset: str, **given: object) -> Program:
    program = program_of("llama")
    policy = {"version": 1, "name": "one", "steps": [{"preset": preset, **given}]}
    plan = make_cache_plan(load_policy(policy, presets=library()), program, cache_sites(program))
    return RebuildCaches(plan).run(program).program


def described(program: Program) -> list[Any]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in program.graph.nodes]


@pytest.mark.parametrize("given", [{}, {"tokens": 12, "recent": 0.25, "sinks": 2}])
def test_the_graph_is_that_of_h2o(given: dict[str, object]) -> None:
    alias, wanted = graph("sinklora", **given), graph("h2o", **given)
    assert described(alias) == described(wanted)
    assert alias.output_names == wanted.output_names
    labels = {node.meta["tokcc"] for node in alias.graph.nodes if "tokcc" in node.meta}
    assert labels >= {f"sinklora@{layer}" for layer in range(3)}


def test_parameters_and_defaults_are_those_of_h2o() -> None:
    ours, theirs = library()["sinklora"], library()["h2o"]
    assert ours.params == theirs.params
    assert ours.steps == theirs.steps
