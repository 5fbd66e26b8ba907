"""Plans are refused with the true reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests.zoo import ZOO
from tokcc.errors import PlanError
from tokcc.testing import plan_for, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


@pytest.mark.parametrize(
    ("layer", "site", "reason"),
    [
        (1, "after_attention", "add_7 behind it is only read by view_27"),
        (2, "after_attention", "no point behind its attention with the tokens of the stream"),
        (3, "block_output", "no point behind its attention with the tokens of the stream"),
    ],
)
def test_a_cut_that_windows_do_not_leave(layer: int, site: str, reason: str) -> None:
    """A Swin stage ends in a downsampling: it is no parallel block, and behind it the tokens are others."""
    entry = ZOO["swin"]
    program = trace(entry.build(), entry.inputs(1))
    step = {"preset": "tome", "at": {"layers": [layer], "site": site}, "restore": "unmerge"}
    with pytest.raises(PlanError, match=f"layer {layer} has no cut") as caught:
        plan_for(program, {"version": 1, "steps": [step]})
    assert caught.value.found is not None
    assert reason in caught.value.found
    assert "parallel" not in caught.value.found


@pytest.mark.parametrize(
    "step",
    [
        {"preset": "power-bert", "keep": 0.5, "warmup": 0.5},
        {"preset": "tome", "r": 1, "inflection": -1.0},
        {"preset": "evit", "budget": {"schedule": [1.0, 0.5, 0.5]}, "at": {"layers": [0, 1, 2]}},
    ],
    ids=lambda step: step["preset"],
)
def test_the_applied_policy_plans_the_same_again(step: dict[str, Any]) -> None:
    """Also where the first or last of the chosen layers keep everything."""
    entry = ZOO["vit"]
    program = trace(entry.build(), entry.inputs(1))
    plan = plan_for(program, {"version": 1, "steps": [step]})
    again = plan_for(program, plan.to_dict())
    assert [(r.layer, r.count) for r in again.reductions] == [(r.layer, r.count) for r in plan.reductions]
    assert 0 < len(plan.reductions) < plan.reductions[0].stages
