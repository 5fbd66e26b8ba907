"""Plans are refused with the true reason."""

from __future__ import annotations

import pytest

from tests.zoo import ZOO
from tokcc.errors import PlanError
from tokcc.testing import plan_for, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


@pytest.mark.parametrize(
    ("layer", "site", "reason"),
    [
        (1, "after_attention", "add_7 behind it is only read by view_33"),
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
