"""Which methods the aoti backend takes: equal in aten operations, or refused with reason and backends that can."""

from __future__ import annotations

import pytest

import tokcc
from tests.cli.tiny_vit import build, pixels
from tests.zoo.contract import InAten, cases, run_case
from tests.zoo.contract_table import Case
from tokcc.errors import LoweringError

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

LOOP = "LoweringError: the aoti backend cannot run `tokcc::{}`"
SIZES = "LoweringError: the aoti backend cannot follow how the number of tokens depends on a dynamic length"

REFUSED = {
    Case("divprune", "deit", dynamic=True): LOOP.format("greedy_select"),
    Case("cdpruner", "deit", dynamic=True): LOOP.format("dpp_select"),
    Case("mmtok", "deit", dynamic=True): LOOP.format("cover_select"),
    Case("cdpruner", "bert", dynamic=True): LOOP.format("dpp_select"),
    Case("tome", "bert", dynamic=True): SIZES,
}
"""Selections that pick one token after another, and counts over a dynamic length."""
TAKEN = (
    Case("tome", "deit", dynamic=True),
    Case("cacovid", "deit", dynamic=True),  # has inputs that the model has not
    Case("power-bert", "bert", dynamic=True),
    Case("h2o", "llama"),
    Case("quest", "llama"),
    Case("xattention", "llama"),
)
"""Encoders, padding, evictions, sparse single tokens and sparse prompts."""
SWEPT = (("deit", True), ("bert", True), ("llama", False), ("mamba", False))


def id_of(case: Case) -> str:
    return str(case)


@pytest.mark.parametrize("case", REFUSED, ids=id_of)
def test_a_method_that_aten_does_not_express_is_refused(case: Case) -> None:
    row = run_case(case, InAten)
    assert row.status == "refused", row.reason
    assert row.reason is not None
    assert row.reason.startswith(REFUSED[case])
    assert "--backend onnx or --backend pt2" in row.reason


@pytest.mark.parametrize("case", TAKEN, ids=id_of)
def test_a_method_in_aten_operations_equals_its_oracle(case: Case) -> None:
    row = run_case(case, InAten)
    assert row.status == "ok", row.reason


@pytest.mark.parametrize(
    ("preset", "operation", "given"),
    [
        ("divprune", "greedy_select", {}),
        ("cdpruner", "dpp_select", {"tokens": 5}),
        ("a-tome", "greedy_select", {}),
    ],
)
def test_the_refusal_names_the_step_and_why(preset: str, operation: str, given: dict[str, int]) -> None:
    policy = {"version": 1, "steps": [{"preset": preset, **given}], "outputs": {"tokens": "reduced"}}
    with pytest.raises(LoweringError) as error:
        tokcc.compile(build(), policy, example_inputs=(pixels(),), backends=("onnx", "aoti"), dry_run=True)
    found = error.value
    assert f"tokcc::{operation}" in found.what
    assert preset in str(found.policy)
    assert "one token after another" in str(found.found)
    assert "--backend onnx or --backend pt2" in str(found.help)
    assert found.exit_code == 5


@pytest.mark.slow
@pytest.mark.parametrize(("model", "dynamic"), SWEPT, ids=[model for model, _ in SWEPT])
def test_every_preset_is_taken_or_refused(model: str, dynamic: bool) -> None:
    """Of each preset: equal to its oracle, or an error that says what is wrong and what to do."""
    rows = [run_case(case, InAten) for case in cases() if (case.model, case.dynamic) == (model, dynamic)]
    assert [f"{row.case}: {row.reason}" for row in rows if row.status == "failed"] == []
    assert {row.status for row in rows} >= {"ok"}
