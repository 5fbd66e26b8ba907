"""The shape of ``report.json``: what a compile saved, what it cost, and how each number was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from tokcc.errors import OutputError, UsageError
from tokcc.report.decoding import (
    ContextPoint,
    Decoding,
    LayerOccupancy,
    NeedlePoint,
    Occupancy,
    PromptPoint,
    TextPoint,
)
from tokcc.report.parts import (
    BreakEvenPoint,
    Fidelity,
    Figure,
    GateResult,
    KeptText,
    Latency,
    LayerRow,
    Machine,
    ModelFacts,
    NodeCounts,
    OutputFidelity,
    Parity,
    ParityCheck,
    Part,
    PeakMemory,
    PolicyFacts,
    Seconds,
    Size,
    Spread,
    TaskMetric,
    TensorFacts,
    Timing,
    Totals,
)

__all__ = [
    "SCHEMA_VERSION",
    "BreakEvenPoint",
    "ContextPoint",
    "Decoding",
    "Fidelity",
    "Figure",
    "GateResult",
    "KeptText",
    "Latency",
    "LayerOccupancy",
    "LayerRow",
    "Machine",
    "ModelFacts",
    "NeedlePoint",
    "NodeCounts",
    "Occupancy",
    "OutputFidelity",
    "Parity",
    "ParityCheck",
    "PeakMemory",
    "PolicyFacts",
    "PromptPoint",
    "Report",
    "Size",
    "Spread",
    "TaskMetric",
    "TensorFacts",
    "TextPoint",
    "Timing",
    "Totals",
    "json_schema",
    "write_json_schema",
]

SCHEMA_VERSION = 1
"""Raised when a reader of the previous version would misread a report."""


class Report(Part):
    """Everything in ``report.json``."""

    schema_version: Literal[1] = Field(default=1, description="Version of this format.")
    created: str = Field(default="", description="UTC time, ISO 8601.")
    model: ModelFacts = Field(description="The model.")
    policy: PolicyFacts = Field(description="The policy.")
    machine: Machine = Field(description="Where it was measured.")
    layers: tuple[LayerRow, ...] = Field(default=(), description="Per block and step.")
    totals: Totals = Field(description="Whole model.")
    nodes: NodeCounts | None = Field(default=None, description="Graph sizes.")
    parity: Parity = Field(description="Engine against the eager oracle.")
    fidelity: Fidelity | None = Field(default=None, description="Engine against baseline; None when not calibrated.")
    latency: Latency | None = Field(default=None, description="Interleaved timing; None when not measured.")
    further: dict[str, Latency] = Field(
        default_factory=dict, description="Timing of further engines by backend, each against its own baseline."
    )
    memory: PeakMemory | None = Field(default=None, description="Peak memory; None when not measured.")
    break_even: tuple[BreakEvenPoint, ...] = Field(default=(), description="Ratio over shapes.")
    decoding: Decoding | None = Field(default=None, description="What only decoders have; None when not measured.")
    gates: tuple[GateResult, ...] = Field(default=(), description="Acceptance conditions.")
    stages: dict[str, Seconds] = Field(default_factory=dict, description="Seconds per pipeline stage, in order.")
    figures: tuple[Figure, ...] = Field(default=(), description="Pictures in the bundle.")
    texts: tuple[KeptText, ...] = Field(default=(), description="Texts with their dropped tokens.")
    warnings: tuple[str, ...] = Field(default=(), description="What a user should act on.")
    notes: tuple[str, ...] = Field(default=(), description="What a user should know.")

    @model_validator(mode="after")
    def _no_number_without_parity(self) -> Self:
        measured = [name for name in ("fidelity", "latency", "memory", "decoding") if getattr(self, name) is not None]
        measured += ["further"] if self.further else []
        if measured and not self.parity.passed:
            raise ValueError(f"{', '.join(measured)} reported although parity did not pass")
        return self

    def noted(self, *notes: str) -> Report:
        """Return the report with more notes."""
        return self.model_copy(update={"notes": (*self.notes, *notes)})

    @property
    def state(self) -> Literal["ok", "accuracy_gate_missed", "speed_gate_missed"]:
        """The bundle's state by its gates; accuracy weighs more than speed."""
        missed = {gate.kind for gate in self.gates if not gate.passed}
        if "accuracy" in missed:
            return "accuracy_gate_missed"
        return "speed_gate_missed" if missed else "ok"

    def to_json(self) -> str:
        """Return the report as indented JSON, ending in a newline."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write ``report.json``; a killed write leaves the previous file.

        Raises:
            OutputError: The file cannot be written.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(f"cannot write {target.name}", found=str(error)) from error

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read ``report.json``.

        Raises:
            UsageError: The file is missing, is not JSON, or is not a report of a version this tokcc reads.
        """
        source = Path(path)
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot read the report {source}", found=str(error), help="give a bundle's path"
            ) from error
        return cls.parse(text, name=str(source))

    @classmethod
    def parse(cls, text: str, *, name: str = "report.json") -> Report:
        """Read a report from JSON text; ``name`` is used in messages."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{name} is not JSON", found=str(error), help=_REBUILD) from error
        if not isinstance(raw, dict):
            raise UsageError(f"{name} is not a report", needed="a JSON object", found=type(raw).__name__, help=_REBUILD)
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(
                f"{name} has another schema version",
                needed=str(SCHEMA_VERSION),
                found=str(raw.get("schema_version")),
                help="read it with the tokcc that wrote it, or compile again",
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _unreadable(name, error) from error


_REBUILD = "the file is damaged: rebuild it with `tokcc calibrate BUNDLE --data D`"


def _unreadable(name: str, error: ValidationError) -> UsageError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole report"
    count = error.error_count()
    found = f"{where}: {first['msg']}" + (f" (and {count - 1} more)" if count > 1 else "")
    return UsageError(f"{name} is not a valid report", found=found, help=_REBUILD)


def json_schema() -> dict[str, JsonValue]:
    """Return the JSON schema of ``report.json``."""
    schema: dict[str, JsonValue] = Report.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def write_json_schema(path: str | Path) -> None:
    """Write the JSON schema of ``report.json`` to a file."""
    Path(path).write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
