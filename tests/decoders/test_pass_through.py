"""A cache below its capacity is handed on as it is: nothing is rated, sorted or copied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.decoders.engine import build, tokens
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.calls import lengths_past
from tokcc.config import load_policy
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

SELECTING = {"TopK", "ArgMin", "GatherND"}


def _operations(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _operations(attribute.g)


def _branches(path: Path) -> tuple[set[str], list[dict[str, list[str]]]]:
    """Operations outside of the layers' branches, and those of the branches of each layer."""
    graph = onnx.load(str(path)).graph
    made = [node for node in graph.node if node.op_type == "If" and "GatherND" in node.name]
    outside = {node.op_type for node in graph.node if node not in made}
    return outside, [{a.name: list(_operations(a.g)) for a in node.attribute} for node in made]


@pytest.mark.parametrize("preset", ["h2o", "keydiff", "streaming-llm"])
def test_only_the_branch_that_evicts_selects(preset: str, tmp_path: Path) -> None:
    build("llama", {"version": 1, "steps": [{"preset": preset, "tokens": 12}]}, tmp_path)
    outside, layers = _branches(tmp_path / "model.onnx")
    assert len(layers) == 3
    assert "GatherND" not in outside
    for layer in layers:
        assert "GatherND" in layer["else_branch"]
        assert not SELECTING & set(layer["then_branch"])


def test_what_only_a_selection_reads_is_not_computed(tmp_path: Path) -> None:
    """A window of queries rates the prompt; a generated token is appended, and rates nothing."""
    build("llama", {"version": 1, "steps": [{"preset": "snapkv", "tokens": 40}]}, tmp_path)
    for layer in _branches(tmp_path / "model.onnx")[1]:
        assert layer["else_branch"].count("MaxPool") == 1
        assert layer["then_branch"].count("MaxPool") == 0
        assert layer["then_branch"].count("Softmax") < layer["else_branch"].count("Softmax")


def test_both_branches_name_their_values_apart(tmp_path: Path) -> None:
    build("llama", {"version": 1, "steps": [{"preset": "h2o", "tokens": 12}]}, tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)

    def names(graph: onnx.GraphProto) -> Iterator[str]:
        for node in graph.node:
            yield from node.output
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from names(attribute.g)

    found = list(names(model.graph))
    assert len(found) == len(set(found))


def test_the_step_that_fills_the_cache_and_the_one_behind_it(tmp_path: Path) -> None:
    """Capacity 12: 11 and 12 entries stay as they are, 13 become 12."""
    engine = build("llama", {"version": 1, "steps": [{"preset": "h2o", "tokens": 12}]}, tmp_path)
    ids, mask = tokens(2, 14, (0, 3))
    lengths = [result["present.0.key"].shape[2] for result in engine.each(ids, mask, (10, 1, 1, 1, 1))]
    assert lengths == [10, 11, 12, 12, 12]


def test_a_choice_of_attentions_goes_along(tmp_path: Path) -> None:
    """A single token computes one of the two, and joins its cache once."""
    step = {"preset": "mpcache", "tokens": 22, "recent": 3, "page": 2}
    build("llama", {"version": 1, "steps": [step]}, tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    layers = [node for node in graph.node if node.op_type == "If" and "GatherND" in node.name]
    assert len(layers) == 3
    for layer in layers:
        for side in layer.attribute:
            inside = list(side.g.node)
            (choice,) = [node for node in inside if node.op_type == "If" and _chooses(node)]
            others = [node for node in inside if node is not choice and side.name == "then_branch"]
            assert not {"Softmax", "TopK", "If", "Identity"} & {node.op_type for node in others}


def _chooses(node: onnx.NodeProto) -> bool:
    ways = [set(_operations(attribute.g)) for attribute in node.attribute]
    return all("Softmax" in way for way in ways) and any("TopK" in way for way in ways)


@pytest.mark.parametrize(
    ("step", "waits"),
    [
        ({"preset": "h2o", "tokens": 40}, 40),
        ({"preset": "tova", "budget": {"keep": 0.5}}, 0),
        ({"preset": "quest", "tokens": 16, "length": 50}, 50 + 4 * 16),
        ({"preset": "streaming-llm", "tokens": 300}, 300),
    ],
)
def test_a_check_reads_until_something_is_left_out(step: dict[str, Any], waits: int) -> None:
    """A parity check of texts that fit into the cache would say nothing of an eviction."""
    program = program_of("llama")
    plan = make_cache_plan(
        load_policy({"version": 1, "steps": [step]}, presets=library()), program, cache_sites(program)
    )
    assert plan.waits == waits
    assert sum(lengths_past(plan.waits)) > waits
