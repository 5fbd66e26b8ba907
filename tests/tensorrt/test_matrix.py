"""The matrix of presets as TensorRT graphs: whole, green, and true of some cells that are run again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tensorrt.rtx import needs_rtx
from tests.zoo.contract_table import Row, read_rows
from tests.zoo.tensorrt import RESULTS, cases, run_case
from tokcc.passes.methods import library

PAGE = Path(__file__).parents[2] / "docs" / "tensorrt.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.case.preset: row for row in read_rows(RESULTS)}


def test_every_preset_is_there(rows: dict[str, Row]) -> None:
    assert set(rows) == set(library())
    assert {case.preset for case in cases()} == set(library())


def test_nothing_failed(rows: dict[str, Row]) -> None:
    assert [str(row.case) for row in rows.values() if row.status not in ("ok", "refused")] == []


def test_refusals_say_what_to_do_and_stand_in_the_docs(rows: dict[str, Row]) -> None:
    refused = {name: row.reason or "" for name, row in rows.items() if row.status == "refused"}
    assert all("help: " in reason for reason in refused.values())
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| preset | why |") : text.index("Methods that read prompts")]
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) == set(refused)
    assert f"{len(rows) - len(refused)} of {len(rows)} presets are built" in text


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("preset", ["evit", "h2o", "agent-memory-q4"])
def test_cells_are_as_they_are_written(preset: str, rows: dict[str, Row]) -> None:
    (case,) = cases([preset])
    row = run_case(case)
    assert (row.status, row.reason) == (rows[preset].status, rows[preset].reason)


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tome", "divprune", "quest", "xattention", "gem-filter", "top-vim"])
def test_further_cells(preset: str, rows: dict[str, Row]) -> None:
    (case,) = cases([preset])
    assert run_case(case).status == rows[preset].status == "ok"
