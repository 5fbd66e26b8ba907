"""A synthetic but complete report, shared by the tests of the report."""

from __future__ import annotations

from tokcc.report.schema import (
    BreakEvenPoint,
    Fidelity,
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
    PeakMemory,
    PolicyFacts,
    Report,
    Spread,
    TaskMetric,
    TensorFacts,
    Timing,
    Totals,
)

SHAPES = {"pixel_values": (1, 3, 224, 224)}


def timing(median: float) -> Timing:
    return Timing(median=median, p10=median * 0.97, p90=median * 1.06, samples=(median * 0.97, median, median * 1.06))


def latency(speedup: float = 1.61) -> Latency:
    return Latency(
        baseline=timing(0.1088),
        engine=timing(0.1088 / speedup),
        speedup=Spread(median=speedup, p10=speedup * 0.95, p90=speedup * 1.04),
        runs=41,
        warmup=3,
        interleaved=True,
        seed=0,
        threads=2,
        shapes=SHAPES,
        runtime="onnxruntime 1.31.1 CPUExecutionProvider",
        batch_size=1,
    )


def fidelity() -> Fidelity:
    return Fidelity(
        source="photos",
        samples=64,
        outputs=(
            OutputFidelity(
                output="logits",
                samples=64,
                cosine_mean=0.9931,
                cosine_min=0.961,
                relative_error_mean=0.081,
                relative_error_max=0.27,
                top1_agreement=0.984,
                kl=0.0123,
            ),
        ),
        metrics=(TaskMetric(name="accuracy", output="logits", before=0.859, after=0.8594 - 0.004, samples=64),),
        weights="trained",
    )


def rows(blocks: int = 12, tokens: int = 197, r: int = 13) -> tuple[LayerRow, ...]:
    found, before = [], 950_000_000
    for layer in range(blocks):
        left = tokens - r * layer
        found.append(
            LayerRow(
                layer=layer,
                site="after_attention",
                step="tome",
                tokens_in=left,
                tokens_out=left - r,
                flops_before=before,
                flops_after=int(before * (left - r / 2) / tokens),
                bytes_before=30_000_000,
                bytes_after=int(30_000_000 * left / tokens),
            )
        )
    return tuple(found)


def report(**changes: object) -> Report:
    layers = rows()
    timed = latency()
    before = sum(row.flops_before for row in layers) + 120_000_000
    after = sum(row.flops_after for row in layers) + 120_000_000
    values: dict[str, object] = {
        "created": "2026-01-01T12:00:00Z",
        "model": ModelFacts(
            source="vit-small",
            kind="ViTForImageClassification",
            task="image-classification",
            parameters=22_050_664,
            blocks=12,
            dtype="float32",
            inputs=(TensorFacts(name="pixel_values", dtype="float32", shape=("batch", 3, 224, 224)),),
            outputs=(TensorFacts(name="logits", dtype="float32", shape=("batch", 10)),),
        ),
        "policy": PolicyFacts(
            name="tome", origin="preset tome", long_form={"version": 1, "steps": [{"node": "merge"}]}
        ),
        "machine": Machine(
            cpu="Example CPU @ 2.60GHz",
            cores=2,
            threads=2,
            os="Linux 6.1",
            python="3.11.7",
            memory_bytes=25_000_000_000,
            versions={"tokcc": "0.1.0", "onnxruntime": "1.31.1"},
        ),
        "layers": layers,
        "totals": Totals.of(
            before, after, latency=timed, inserted_seconds=0.0031, inserted_how="a profiled run", shapes=SHAPES
        ),
        "nodes": NodeCounts(baseline=395, engine=561, by_op={"TopK": (0, 12), "GatherND": (0, 24), "MatMul": (72, 96)}),
        "parity": Parity(
            passed=True,
            batches=3,
            checks=(
                ParityCheck(
                    engine="onnx", output="logits", max_abs_diff=3.1e-6, scale=7.4, atol=1e-4, rtol=1e-4, passed=True
                ),
            ),
        ),
        "fidelity": fidelity(),
        "latency": timed,
        "memory": PeakMemory(baseline_bytes=412_000_000, engine_bytes=371_000_000, how="VmHWM of a fresh process"),
        "break_even": (
            BreakEvenPoint(
                shapes={"pixel_values": (1, 3, 96, 96)},
                label="96x96",
                tokens=37,
                ratio=Spread(median=0.94, p10=0.9, p90=0.99),
                runs=31,
            ),
            BreakEvenPoint(
                shapes=SHAPES, label="224x224", tokens=197, ratio=Spread(median=1.61, p10=1.53, p90=1.67), runs=41
            ),
        ),
        "gates": (
            GateResult(
                expression="top1_agreement>=0.98",
                metric="top1_agreement",
                kind="accuracy",
                threshold=0.98,
                value=0.984,
                passed=True,
            ),
        ),
        "stages": {"load": 1.2, "capture": 6.4, "insert": 0.3, "lower": 3.3, "calibrate": 31.0},
        "texts": (KeptText(tokens=("[CLS]", "a", "fine", "<b>day</b>", "[SEP]"), gone_after=(None, 2, None, 5, None)),),
        "warnings": ("at 96x96 the engine is slower than the baseline (0.94x)",),
        "notes": ("fidelity was measured on 64 photos",),
    }
    return Report.model_validate({**values, **changes})
