"""A budget that removes nothing leaves the model alone: no node, the same graph."""

from __future__ import annotations

from typing import Any

import pytest

from tests.passes.oracle import program_of
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.passes.methods import library
from tokcc.testing import reduce_program

NOTHING: dict[str, dict[str, Any]] = {
    "tome": {"r": 0},
    "pitome": {"ratio": 1.0},
    "evit": {"keep": 1.0},
    "zero-tprune": {"keep": 1.0, "duplicates": 0},
    "fastervlm": {"budget": {"keep": 1.0}},
    "vtc-cls": {"budget": {"keep": 1.0}},
    "divprune": {"keep": 1.0},
    "power-bert": {"keep": 1.0},
    "ltp": {"keep": 1.0},
    "spatten-topk": {"keep": 1.0},
    "audio-avgpool": {"stride": 1},
    "a-tome": {"budget": {"keep": 1.0}},
    "random": {"keep": 1.0},
    "uniform": {"keep": 1.0},
}


def test_every_preset_is_here() -> None:
    nodes = {name: preset.long_form()["steps"][0]["node"] for name, preset in library().items()}
    encoders = {name for name, node in nodes.items() if node not in ("evict_kv", "store_kv")}
    assert set(NOTHING) == encoders


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_nothing_to_remove(name: str) -> None:
    step = {"preset": name, **NOTHING[name]}
    wanted = {"version": 1, "steps": [step], "outputs": {"*": "full"}}
    for model, feeds in ((vision(), {"patches": patches(2, 50)}), (text(), sentences([12, 7]))):
        program = program_of(model, feeds)
        reduced, plan = reduce_program(program, wanted)
        assert plan.reductions == ()
        before = [(node.op, node.name, node.target) for node in program.graph.nodes]
        assert [(node.op, node.name, node.target) for node in reduced.graph.nodes] == before
        assert not any("tokcc" in node.meta for node in reduced.graph.nodes)
