"""Every encoder with every kind of policy equals its eager oracle in ONNX Runtime, or is refused with help."""

from __future__ import annotations

import os

import pytest

from tests.zoo.matrix import LIMIT, RESULTS, Case, Row, cases, read_rows, run_case, write_rows
from tests.zoo.models import ZOO

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

UPDATE = "TOKCC_UPDATE_MATRIX"
"""Set to 1: the slow test writes ``benchmarks/results/zoo_matrix.json`` again."""

SOME = [
    Case("vit_classifier", "evit", True),
    Case("vit_classifier", "tome", False),
    Case("deit", "tome", True),
    Case("deit", "uniform", False),
    Case("siglip_vision", "tome", False),
    Case("siglip_vision", "uniform", True),
    Case("bert_classifier", "power-bert", True),
    Case("bert_classifier", "tome", False),
    Case("bert_mean_pooled", "uniform", False),
    Case("torch_encoder_nbc_pre", "none", True),
    Case("torch_encoder_nbc_pre", "uniform", True),
    Case("torch_encoder_nbc_pre", "power-bert", False),
]
NO_CLASS_TOKEN_READ = {"bert_mean_pooled", "distilbert", "electra", "modernbert"}
"""Text models whose outputs say nothing about token 0: that it is a class token cannot be seen from the graph."""


def expected_refusal(case: Case) -> bool:
    """Windows are not token sequences, state-space scans are no attention, and EViT reads a class token."""
    entry = ZOO[case.model]
    no_class_token = not entry.has_cls or case.model in NO_CLASS_TOKEN_READ
    return case.preset != "none" and (entry.windowed or entry.scanned or (case.preset == "evit" and no_class_token))


def judge(case: Case, row: Row) -> None:
    if row.status == "skipped":
        pytest.skip(row.reason or "not available")
    assert row.status == ("refused" if expected_refusal(case) else "ok"), row.reason
    if row.status == "ok":
        assert row.max_rel_diff is not None
        assert row.max_rel_diff <= LIMIT


@pytest.mark.parametrize("case", SOME, ids=str)
def test_some_cells(case: Case) -> None:
    judge(case, run_case(case))


@pytest.mark.parametrize("preset", ["tome", "uniform"])
def test_windows_are_refused(preset: str) -> None:
    row = run_case(Case("swin", preset, False))
    assert row.status == "refused"
    assert row.reason is not None
    assert "help: " in row.reason


def test_a_class_token_method_needs_one() -> None:
    row = run_case(Case("siglip_vision", "evit", False))
    assert row.status == "refused"
    assert row.reason is not None
    assert "class token" in row.reason


def written() -> dict[Case, Row]:
    return {Case(row["model"], row["preset"], row["dynamic"]): Row(**row) for row in read_rows(RESULTS)}


@pytest.mark.slow
def test_written_matrix_is_whole() -> None:
    """The committed table has a row for every cell of today's zoo."""
    assert set(written()) == set(cases())


def test_written_matrix_is_within_the_limit() -> None:
    """No row of the committed table is bad, and every one is a cell of today's zoo."""
    rows = written()
    assert rows
    assert set(rows) <= set(cases())
    for case, row in rows.items():
        if row.status == "skipped":
            continue
        assert row.status == ("refused" if expected_refusal(case) else "ok"), case
        assert row.status == "refused" or (row.max_rel_diff is not None and row.max_rel_diff <= LIMIT), case


@pytest.fixture(scope="module")
def collected() -> list[Row]:
    return []


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_cell(case: Case, collected: list[Row]) -> None:
    row = run_case(case)
    collected.append(row)
    judge(case, row)


@pytest.mark.slow
def test_write_the_matrix(collected: list[Row]) -> None:
    if not os.environ.get(UPDATE):
        pytest.skip(f"{UPDATE} is not set")
    assert len(collected) == len(cases()), "run the whole matrix to write it"
    write_rows(collected)
