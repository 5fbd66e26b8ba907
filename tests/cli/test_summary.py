"""What the command line shows of a bundle, and how a missed gate ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

import tokcc
from tokcc.backends.bundle import BackendEntry, Bundle, BundleWriter, Manifest
from tokcc.cli import app
from tokcc.report.schema import (
    Fidelity,
    GateResult,
    Latency,
    LayerRow,
    Machine,
    ModelFacts,
    OutputFidelity,
    Parity,
    ParityCheck,
    PolicyFacts,
    Report,
    Spread,
    Timing,
    Totals,
)

CHECK = ParityCheck(engine="onnx", output="features", max_abs_diff=2e-6, scale=3.0, atol=1e-4, rtol=1e-3, passed=True)
LATENCY = Latency(
    baseline=Timing(median=0.2, p10=0.19, p90=0.21),
    engine=Timing(median=0.1, p10=0.09, p90=0.11),
    speedup=Spread(median=2.0, p10=1.9, p90=2.1),
    runs=30,
    warmup=3,
    interleaved=True,
    seed=0,
    threads=1,
    shapes={"x": (8, 3, 224, 224)},
    runtime="onnxruntime 1.31 CPUExecutionProvider",
    batch_size=8,
)


def gate(kind: Literal["accuracy", "speed"], value: float | None, *, passed: bool) -> GateResult:
    metric = "cosine" if kind == "accuracy" else "speedup"
    return GateResult(expression=f"{metric}>=3", metric=metric, kind=kind, threshold=3, value=value, passed=passed)


def make(folder: Path, *gates: GateResult) -> Bundle:
    report = Report(
        model=ModelFacts(source="m.pt"),
        policy=PolicyFacts(name="tome"),
        machine=Machine(cpu="x", cores=2, threads=1, os="Linux", python="3.11"),
        layers=tuple(
            LayerRow(
                layer=layer,
                site="after_attention",
                step="tome",
                tokens_in=197 - 13 * layer,
                tokens_out=184 - 13 * layer,
                flops_before=10**9,
                flops_after=9 * 10**8,
                bytes_before=1,
                bytes_after=1,
            )
            for layer in range(2)
        ),
        totals=Totals.of(2 * 10**9, 18 * 10**8, latency=LATENCY),
        parity=Parity(passed=True, batches=2, checks=(CHECK,)),
        fidelity=Fidelity(
            source="photos", samples=20, outputs=(OutputFidelity(output="features", samples=20, cosine_mean=0.987),)
        ),
        latency=LATENCY,
        gates=gates,
        warnings=("it loses at batch 1",),
    )
    with BundleWriter(folder) as writer:
        (writer.path / "model.onnx").write_text("engine")
        (writer.path / "report.html").write_text("<html>")
        report.save(writer.path / "report.json")
        manifest = Manifest(
            tokcc="0.1.0",
            created="2026-01-01T00:00:00Z",
            model="m.pt",
            policy="tome",
            state=report.state,
            backends={"onnx": BackendEntry(engine="model.onnx")},
        )
        return writer.commit(manifest)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("tokcc.pipeline")
    monkeypatch.setitem(sys.modules, "tokcc.pipeline", module)
    monkeypatch.setattr(tokcc, "pipeline", module, raising=False)
    return module


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_report(tmp_path: Path) -> None:
    bundle = make(tmp_path / "out", gate("speed", 2.0, passed=False))
    result = run("report", str(bundle.path))
    assert result.exit_code == 0
    for text in (
        "197 -> 184",
        "184 -> 171",
        "1 G -> 900 M",
        "10 %",
        "ideal speedup     1.11x",
        "realised speedup  2.00x (1.90x to 2.10x)",
        "largest difference 2e-06",
        "photos, 20 samples",
        "0.9870",
        "gate MISSED  speedup>=3: 2",
        "it loses at batch 1",
        str(bundle.path / "report.html"),
    ):
        assert text in result.stdout
    assert json.loads(run("report", str(bundle.path), "--json").stdout) == json.loads(
        (bundle.path / "report.json").read_text()
    )
    assert run("report", str(bundle.path), "--quiet").stdout == f"{bundle.path / 'report.html'}\n"


def test_report_opens_the_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make(tmp_path / "out")
    opened: list[str] = []

    def browser(url: str) -> bool:
        opened.append(url)
        return len(opened) == 1

    monkeypatch.setattr("webbrowser.open", browser)
    assert "no browser" not in run("report", str(bundle.path), "--open").stderr
    assert "no browser" in run("report", str(bundle.path), "--open").stderr
    assert opened == [(bundle.path / "report.html").as_uri()] * 2


@pytest.mark.parametrize(
    ("gates", "code"),
    [
        ((), 0),
        ((gate("speed", 3.1, passed=True),), 0),
        ((gate("speed", 2.0, passed=False),), 8),
        ((gate("accuracy", 0.9, passed=False),), 7),
        ((gate("speed", 2.0, passed=False), gate("accuracy", None, passed=False)), 7),
    ],
)
def test_gates_decide_the_exit_code(
    tmp_path: Path, pipeline: ModuleType, gates: tuple[GateResult, ...], code: int
) -> None:
    bundle = make(tmp_path / "out", *gates)
    pipeline.compile = lambda *args, **options: bundle  # type: ignore[attr-defined]
    result = run("compile", "m.pt", "-p", "tome", "-o", str(bundle.path))
    assert result.exit_code == code
    assert "197 -> 184" in result.stdout
    if code:
        assert "the bundle is kept" in result.stderr
    quiet = run("compile", "m.pt", "-p", "tome", "-o", str(bundle.path), "-q")
    assert quiet.stdout == f"{bundle.path}\n"
    assert quiet.exit_code == code


def test_json_of_a_missed_gate_is_one_object(tmp_path: Path, pipeline: ModuleType) -> None:
    bundle = make(tmp_path / "out", gate("accuracy", 0.9, passed=False))
    pipeline.compile = lambda *args, **options: bundle  # type: ignore[attr-defined]
    result = run("compile", "m.pt", "-p", "tome", "-o", str(bundle.path), "--json")
    data = json.loads(result.stdout)
    assert data["state"] == "accuracy_gate_missed"
    assert data["error"]["exit_code"] == result.exit_code == 7


def test_verify(tmp_path: Path, pipeline: ModuleType) -> None:
    bundle = make(tmp_path / "out")
    pipeline.verify = lambda *args, **options: bundle.report.parity  # type: ignore[attr-defined]
    result = run("verify", str(bundle.path))
    assert result.exit_code == 0
    assert "3 files have the hashes of the manifest" in result.stdout
    failed = CHECK.model_copy(update={"passed": False, "max_abs_diff": 1.0})
    parity = Parity(passed=False, batches=2, checks=(failed,))
    pipeline.verify = lambda *args, **options: parity  # type: ignore[attr-defined]
    result = run("verify", str(bundle.path))
    assert result.exit_code == 6
    assert "output `features`" in result.stderr
    (bundle.path / "model.onnx").write_text("tampered")
    result = run("verify", str(bundle.path))
    assert result.exit_code == 5
    assert "`model.onnx` is changed" in result.stderr


def test_commands_want_a_bundle(tmp_path: Path) -> None:
    for arguments in (("verify",), ("report",)):
        result = run(*arguments, str(tmp_path))
        assert result.exit_code == 2
        assert "is not a tokcc bundle" in result.stderr
