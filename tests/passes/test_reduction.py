"""One reduction: where it removes nothing it is left out as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.reference_models import audio, frames, patches, vision
from tokcc.analysis.context import Context
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.program import Program
from tokcc.passes.kept import kept_stages
from tokcc.testing import plan_for, reduce_program, run_eager, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

NOTHING: list[dict[str, Any]] = [
    {"node": "prune", "score": {"kind": "norm"}, "select": {"kind": "topk"}, "budget": {"keep": 0.95}},
    {"node": "prune", "score": {"kind": "norm"}, "select": {"kind": "topk"}, "budget": {"tokens": 100}},
    {"node": "prune", "select": {"kind": "uniform"}, "budget": {"tokens": 8}},
    {"node": "prune", "select": {"kind": "greedy"}, "budget": {"keep": 0.95}},
    {"node": "merge", "select": {"kind": "bipartite"}, "budget": {"keep": 0.95}},
    {"node": "merge", "select": {"kind": "energy"}, "budget": {"tokens": 9}},
    {"node": "merge", "select": {"kind": "adjacent"}, "budget": {"keep": 0.95}},
    {
        "node": "prune",
        "score": {"kind": "norm"},
        "select": {"kind": "topk"},
        "reduce": {"kind": "fuse_rest"},
        "budget": {"tokens": 8},
    },
]


def policy(*steps: dict[str, Any], outputs: str = "full") -> dict[str, Any]:
    return {"version": 1, "steps": list(steps), "outputs": {"tokens": outputs}}


def inserted(program: Program) -> list[str]:
    return [node.name for node in program.graph.nodes if node.meta.get("tokcc")]


@pytest.mark.parametrize("step", NOTHING, ids=[f"{s['select']['kind']}-{i}" for i, s in enumerate(NOTHING)])
def test_what_removes_nothing_is_left_out(step: dict[str, Any]) -> None:
    feeds: dict[str, Tensor] = {"patches": patches(2, 9)}
    program = trace(vision(2), feeds)
    reduced, plan = reduce_program(program, policy({"protect": {"first": 1}, **step}))
    assert inserted(reduced) == []
    assert [space.size for space in plan.made] == [9] * len(plan.reductions)  # the report lists them
    for before, after in zip(run_program(program, feeds), run_program(reduced, feeds), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_others_stay() -> None:
    """At 8, 7, 7 and 7 candidates nine tenths are 8, 7, ... : rounding up, nothing goes below ten."""
    feeds = {"frames": frames(2, 11)}
    program = trace(audio(4), feeds)
    step = {"node": "merge", "select": {"kind": "energy"}, "budget": {"keep": 0.9}}
    reduced, plan = reduce_program(program, policy(step))
    assert [space.size for space in plan.made] == [10, 9, 9, 9]
    assert len({id(space) for space in plan.made}) == 2
    labels = {node.meta["tokcc"] for node in reduced.graph.nodes if node.meta.get("tokcc")}
    assert {label.rpartition("@")[2] for label in labels} == {"0", "1", "restore"}
    stages = list(kept_stages(program, plan_for(program, policy(step)), feeds))
    assert [kept.sum(1).tolist() for _, _, kept, _ in stages] == [[10, 10], [9, 9], [9, 9], [9, 9]]


def test_a_first_reduction_that_removes_nothing_is_pictured_whole() -> None:
    feeds = {"frames": frames(2, 6)}
    program = trace(audio(2), feeds)
    plan = plan_for(program, policy({"node": "prune", "select": {"kind": "uniform"}, "budget": {"tokens": 6}}))
    for _, _, kept, assign in kept_stages(program, plan, feeds):
        assert kept.all()
        assert assign is None


def test_a_dynamic_length_keeps_its_reduction() -> None:
    """Nothing to remove from the example is not nothing to remove."""
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=1, max=60)}}
    program = trace(audio(2), {"frames": frames(2, 8)}, shapes)
    step = {"node": "prune", "select": {"kind": "uniform"}, "budget": {"tokens": 8}}
    reduced, _ = reduce_program(program, policy(step, outputs="reduced"))
    assert run_program(reduced, {"frames": frames(2, 20)})[0].shape[1] == 8


def test_neighbours_behind_a_protected_token_join_their_neighbour() -> None:
    feeds: dict[str, Tensor] = {"patches": patches(2, 12)}
    step = {"node": "merge", "select": {"kind": "adjacent"}, "budget": {"remove": 3}, "protect": {"first": 1}}
    _, plan = run_eager(trace(vision(1), feeds), policy(step), feeds)
    (space,) = plan.made
    assign = space.assign(Context(EagerBuilder())) if callable(space.assign) else space.assign
    for row, kept in zip(assign.tolist(), space.index.tolist(), strict=True):
        assert [kept[slot] for slot in row] == [i if i in kept else i - 1 for i in range(12)]
