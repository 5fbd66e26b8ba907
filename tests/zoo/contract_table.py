"""The written contract matrix: one line for each preset, reasons of refusals once each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["COMMAND", "LIMIT", "RESULTS", "Case", "Row", "read_rows", "write_rows"]

LIMIT = 2e-4
"""Largest difference between engine and oracle, as a share of the output's scale."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "contract_matrix.json"
COMMAND = "python -m tests.zoo.contract"
_DYNAMIC = "@dynamic"
Status = Literal["ok", "refused", "failed", "skipped"]


@dataclass(frozen=True, order=True)
class Case:
    """One cell.

    Attributes:
        preset: The method.
        model: An encoder of the zoo, or a family of decoders.
        dynamic: An encoder with symbolic batch and length; otherwise of a fixed batch.
    """

    preset: str
    model: str
    dynamic: bool = False

    @property
    def column(self) -> str:
        """The model as the table names it."""
        return self.model + _DYNAMIC * self.dynamic

    def __str__(self) -> str:
        return f"{self.preset}-{self.column}"

    @classmethod
    def of(cls, preset: str, column: str) -> Case:
        """Return the case of a written cell."""
        return cls(preset, column.removesuffix(_DYNAMIC), column.endswith(_DYNAMIC))


@dataclass(frozen=True)
class Row:
    """What came of a cell.

    Attributes:
        case: The cell.
        status: ``ok``: the engine equals its oracle. ``refused``: an error that says why and what to do. ``failed``:
            anything else. ``skipped``: the library is not installed.
        max_rel_diff: Largest difference to the eager oracle, as a share of the output's scale.
        reason: Of a refusal or a failure.
    """

    case: Case
    status: Status
    max_rel_diff: float | None = None
    reason: str | None = None


HEAD = {
    "what": "engine in ONNX Runtime against the eager oracle, fp32, tiny random-weight models of each architecture",
    "cells": "by preset: `ok` with the largest difference, as a share of the output's scale; `refused` and others "
    "with the number of the reason",
    "limit": LIMIT,
    "command": COMMAND,
}


def write_rows(
    rows: Iterable[Row], cases: Sequence[Case], path: Path = RESULTS, head: Mapping[str, Any] = HEAD
) -> None:
    """Write the matrix; cells that were skipped or not run here are kept from the file that is there.

    Args:
        rows: What was run.
        cases: Today's cells; others are dropped.
        path: The file.
        head: What stands above the cells.
    """
    known = {row.case: row for row in read_rows(path)} if path.is_file() else {}
    known |= {row.case: row for row in rows if row.status != "skipped" or row.case not in known}
    reasons: dict[str, int] = {}
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for case in sorted(cases, key=lambda case: case.preset):
        row = known.get(case)
        if row is None:
            continue
        value: Any = row.max_rel_diff and float(f"{row.max_rel_diff:.2g}")
        if row.status != "ok":
            value = reasons.setdefault(row.reason or "", len(reasons))
        table.setdefault(case.preset, {}).setdefault(row.status, {})[case.column] = value
    shown = {**head, "reasons": list(reasons)}
    lines = ",\n  ".join(f"{json.dumps(preset)}: {json.dumps(cells)}" for preset, cells in table.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shown, indent=1)[:-2] + f',\n "presets": {{\n  {lines}\n }}\n}}\n', encoding="utf-8")


def read_rows(path: Path = RESULTS) -> list[Row]:
    """Return the rows of a written matrix."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for preset, cells in data["presets"].items():
        for status, columns in cells.items():
            for column, value in columns.items():
                case = Case.of(preset, column)
                if status == "ok":
                    rows.append(Row(case, "ok", max_rel_diff=value))
                else:
                    rows.append(Row(case, status, reason=data["reasons"][value]))
    return rows
