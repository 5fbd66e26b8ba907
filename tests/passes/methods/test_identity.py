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
    "dymu": {"r": 0},
    "tca": {"rate": 1.0},
    "token-transforming": {"keep": 1.0},
    "dynamicvit": {"keep": 1.0, "at": {"layers": [0, 1, 2]}},
    "sit-slim": {"keep": 1.0, "at": {"layers": [0, 1, 2]}},
    "ltm": {"keep": 1.0},
    "pyra": {"r": 0},
    "vispruner": {"budget": {"keep": 1.0}},
    "hiprune": {"budget": {"keep": 1.0}},
    "visionzip": {"budget": {"keep": 1.0}},
    "visiondrop": {"budget": {"keep": 1.0}},
    "prumerge": {"budget": {"keep": 1.0}},
    "prumerge-plus": {"budget": {"keep": 1.0}},
    "todre": {"keep": 1.0},
    "hired": {"keep": 1.0},
    "token-corr": {"keep": 1.0},
    "flowcut": {"budget": {"keep": 1.0}, "at": {"layers": [1]}},
    "zoo-prune": {"budget": {"keep": 1.0}},
    "vqtoken": {"budget": {"keep": 1.0}},
    "idpruner": {"keep": 1.0},
    "cdpruner": {"budget": {"keep": 1.0}},
    "mmtok": {"budget": {"keep": 1.0}},
    "flashvlm": {"budget": {"keep": 1.0}},
    "embedlens-drop": {"keep": 1.0},
    "segpruner": {"budget": {"keep": 1.0}},
    "quota": {"keep": 1.0},
    "var-sink": {"keep": 1.0},
    "cacovid": {"keep": 1.0},
    "qts-plus": {"keep": 1.0},
    "focusui": {"keep": 1.0},
    "explain-compress": {"keep": 1.0},
    "echoing-pixels": {"keep": 1.0},
    "focus-detr": {"keep": [1.0, 1.0, 1.0], "at": {"layers": [0, 1, 2]}, "levels": [[7, 7]]},
}

DECIDED_BY_THE_INPUT = {"ats", "as-vit"}
"""Their budget is only how much room there is."""

NOT_ONLY_REMOVING = {"tokenflex", "quecc", "mustdrop", "vflowopt"}
"""Projectors change all tokens however many are left, and encoders' parts of a method tell the rest of it something."""

OF_OTHER_MODELS = {"top-vim"}
"""State-space mixers are not in the models below; its own tests have them."""


def test_every_preset_is_here() -> None:
    nodes = {name: preset.long_form()["steps"][0]["node"] for name, preset in library().items()}
    decoders = {name for name, preset in library().items() if "decoder" in preset.needs}
    # Of caches, or what is read of tokens that all stay.
    keeping = ("evict_kv", "store_kv", "sparse_attention", "bias_attention")
    encoders = {name for name, node in nodes.items() if node not in keeping} - decoders
    assert set(NOTHING) | DECIDED_BY_THE_INPUT | NOT_ONLY_REMOVING | OF_OTHER_MODELS == encoders


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
