"""The parts of a report: facts, per-layer rows, measurements, gates.

Every model is frozen and refuses unknown keys, so a report that loads is a report that is understood. Floats are finite
by construction (JSON has no NaN): a number that could not be measured is ``None``, never a made-up value.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

__all__ = [
    "BreakEvenPoint",
    "Fidelity",
    "Figure",
    "GateResult",
    "KeptText",
    "Latency",
    "LayerRow",
    "Machine",
    "ModelFacts",
    "NodeCounts",
    "OutputFidelity",
    "Parity",
    "ParityCheck",
    "Part",
    "PeakMemory",
    "PolicyFacts",
    "Seconds",
    "Size",
    "Spread",
    "TaskMetric",
    "TensorFacts",
    "Timing",
    "Totals",
]

Size = int | str
"""A token count or a dimension: an int, or an expression such as ``s0 - 13`` when the axis is dynamic."""

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Part(BaseModel):
    """Base of all parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorFacts(Part):
    """An input or output of the engine."""

    name: str = Field(description="Name in the engine, the same as in the original export.")
    dtype: str = Field(description="Numpy name of the element type, for instance float32.")
    shape: tuple[Size, ...] = Field(description="Dimensions; a string is a dynamic axis.")
    doc: str | None = Field(default=None, description="What it holds, where the policy added the input.")
    unguided: float | None = Field(
        default=None, description="What to feed to such an input, in all places, where the method is not to be guided."
    )


class ModelFacts(Part):
    """The model that was compiled."""

    source: str = Field(description="What was given: file name, directory name or class name.")
    kind: str | None = Field(default=None, description="Class or architecture, for instance ViTForImageClassification.")
    task: str | None = Field(default=None, description="Task, where known.")
    parameters: Count | None = Field(default=None, description="Number of parameters.")
    blocks: Count | None = Field(default=None, description="Number of transformer blocks that were found.")
    dtype: str | None = Field(default=None, description="Floating-point type of the weights.")
    inputs: tuple[TensorFacts, ...] = Field(default=(), description="Inputs of the engine.")
    outputs: tuple[TensorFacts, ...] = Field(default=(), description="Outputs of the engine.")


class PolicyFacts(Part):
    """The policy that was applied."""

    name: str = Field(description="Name of the policy, or of the preset.")
    origin: str = Field(default="", description="File or preset that it came from.")
    long_form: dict[str, JsonValue] = Field(
        default_factory=dict, description="The policy spelled out, every preset and default filled in; replayable."
    )


class Machine(Part):
    """Where the numbers were measured."""

    cpu: str = Field(description="CPU model name.")
    cores: Count = Field(description="Logical cores that this process may use.")
    threads: Count = Field(description="Threads that the runtime was given; 0 = its default.")
    os: str = Field(description="Operating system and kernel.")
    python: str = Field(description="Python version.")
    memory_bytes: Count | None = Field(default=None, description="Physical memory.")
    gpu: str | None = Field(default=None, description="GPU, when one took part.")
    versions: dict[str, str] = Field(default_factory=dict, description="Versions of the packages that took part.")


class LayerRow(Part):
    """What happens at one block: one row per step that acts there, or one row with an empty step when none does.

    FLOPs and bytes are those of the block at the shapes of ``totals.shapes``; embedding and head count in the totals.
    """

    layer: int = Field(description="Block, counted from 0.")
    site: str = Field(default="", description="Where in the block the step acts; empty when none does.")
    step: str = Field(default="", description="The step's preset or node kind; empty when no step acts here.")
    tokens_in: Size = Field(description="Tokens that enter the step.")
    tokens_out: Size = Field(description="Tokens that leave it.")
    flops_before: Count = Field(description="FLOPs of the block in the original model.")
    flops_after: Count = Field(description="FLOPs of the block in the engine, inserted nodes included.")
    bytes_before: Count = Field(description="Bytes of activations that the block reads and writes, original model.")
    bytes_after: Count = Field(description="The same in the engine.")
    kv_bytes_before: Count | None = Field(default=None, description="Bytes of the block's KV cache, original model.")
    kv_bytes_after: Count | None = Field(default=None, description="The same in the engine.")


class Spread(Part):
    """A ratio measured by paired runs."""

    median: Positive = Field(description="Median of the per-round ratios.")
    p10: Positive = Field(description="10th percentile of the per-round ratios.")
    p90: Positive = Field(description="90th percentile of the per-round ratios.")


class Totals(Part):
    """The whole model. ``Totals.of`` fills the ratios."""

    flops_before: Count = Field(description="FLOPs of the original model at `shapes`.")
    flops_after: Count = Field(description="FLOPs of the engine at `shapes`, inserted nodes included.")
    ideal_speedup: Positive | None = Field(description="flops_before / flops_after.")
    realised_speedup: Spread | None = Field(default=None, description="Baseline time / engine time, interleaved runs.")
    realised_over_ideal: Positive | None = Field(default=None, description="Median realised speedup / ideal speedup.")
    inserted_seconds: Seconds | None = Field(default=None, description="Seconds a run spends in inserted nodes.")
    inserted_how: str = Field(default="", description="How these seconds were measured.")
    inserted_share: Fraction | None = Field(default=None, description="The same as a share of the engine's time.")
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict, description="Input shapes the FLOPs hold for.")

    @classmethod
    def of(
        cls,
        flops_before: int,
        flops_after: int,
        *,
        latency: Latency | None = None,
        inserted_seconds: float | None = None,
        inserted_how: str = "",
        shapes: dict[str, tuple[int, ...]] | None = None,
    ) -> Totals:
        """Return the totals with every ratio that the given numbers allow."""
        ideal = flops_before / flops_after if flops_before and flops_after else None
        realised = latency.speedup if latency else None
        share = None
        if latency is not None and inserted_seconds is not None and latency.engine.median > 0:
            share = min(1.0, inserted_seconds / latency.engine.median)
        return cls(
            flops_before=flops_before,
            flops_after=flops_after,
            ideal_speedup=ideal,
            realised_speedup=realised,
            realised_over_ideal=realised.median / ideal if realised and ideal else None,
            inserted_seconds=inserted_seconds,
            inserted_how=inserted_how,
            inserted_share=share,
            shapes=shapes or {},
        )


class NodeCounts(Part):
    """Size of the graphs."""

    baseline: Count = Field(description="Nodes of the baseline engine.")
    engine: Count = Field(description="Nodes of the engine.")
    by_op: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="Operator type -> (baseline, engine), where they differ."
    )


class ParityCheck(Part):
    """One output of one engine against the eager oracle."""

    engine: str = Field(description="Backend that wrote the engine.")
    output: str = Field(description="Name of the output.")
    max_abs_diff: float = Field(ge=0, description="Largest absolute difference over all batches.")
    scale: float = Field(ge=0, description="Largest absolute value of the oracle's output.")
    atol: float = Field(ge=0, description="Absolute tolerance.")
    rtol: float = Field(ge=0, description="Relative tolerance.")
    passed: bool = Field(description="Whether |engine - oracle| <= atol + rtol * |oracle| everywhere.")


class Parity(Part):
    """Whether the engine computes what the eager reduced program computes. Nothing is reported unless it does."""

    passed: bool = Field(description="All checks passed.")
    batches: Count = Field(description="Batches of inputs that were tested.")
    reference: str = Field(default="eager reduced program", description="What the engine was compared with.")
    inputs: str = Field(default="random", description="Where the inputs came from: random, calibration.")
    checks: tuple[ParityCheck, ...] = Field(default=(), description="Per engine and output.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.passed and not all(check.passed for check in self.checks):
            raise ValueError("parity.passed is true but a check failed")
        return self

    @property
    def max_abs_diff(self) -> float | None:
        """Largest absolute difference over all outputs, or None without a check."""
        return max((check.max_abs_diff for check in self.checks), default=None)


class OutputFidelity(Part):
    """One output of the engine against the baseline engine, over the calibration data."""

    output: str = Field(description="Name of the output.")
    samples: Count = Field(description="Samples compared; samples with NaN or infinity are not among them.")
    cosine_mean: float | None = Field(default=None, description="Mean over samples of the cosine similarity.")
    cosine_min: float | None = Field(default=None, description="Smallest cosine similarity of a sample.")
    relative_error_mean: float | None = Field(
        default=None, description="Mean of |engine - baseline| / |baseline| (L2)."
    )
    relative_error_max: float | None = Field(default=None, description="Largest relative error of a sample.")
    top1_agreement: Fraction | None = Field(default=None, description="Share of rows with the same largest entry.")
    kl: float | None = Field(default=None, description="Mean KL(baseline || engine) of the softmax, in nats.")
    exact_match: Fraction | None = Field(default=None, description="Share of equal entries, integer outputs only.")
    nonfinite_samples: Count = Field(default=0, description="Samples where the engine alone has NaN or infinity.")


class TaskMetric(Part):
    """A metric that needs ground truth."""

    name: str = Field(description="accuracy, perplexity, ...")
    output: str = Field(description="Output that it is computed from.")
    before: float = Field(description="Value of the baseline engine.")
    after: float = Field(description="Value of the engine.")
    samples: Count = Field(description="Samples (tokens, for perplexity) that it is computed over.")
    higher_is_better: bool = Field(default=True, description="Direction of the metric.")


class Fidelity(Part):
    """What the reduction costs, measured against the baseline engine."""

    source: str = Field(description="The calibration data.")
    samples: Count = Field(description="Samples fed.")
    outputs: tuple[OutputFidelity, ...] = Field(description="Per output.")
    metrics: tuple[TaskMetric, ...] = Field(default=(), description="Task metrics, when labels are given.")
    skipped: dict[str, str] = Field(default_factory=dict, description="Outputs not compared -> why.")
    weights: Literal["trained", "random", "unknown"] = Field(
        default="unknown", description="With random weights, fidelity says nothing about a trained model."
    )


class Timing(Part):
    """Wall-clock seconds of one run."""

    median: Seconds = Field(description="Median.")
    p10: Seconds = Field(description="10th percentile.")
    p90: Seconds = Field(description="90th percentile.")
    samples: tuple[Seconds, ...] = Field(default=(), description="Every timed run, in order.")


class Latency(Part):
    """Engine against baseline engine on the same inputs, in the same process."""

    baseline: Timing = Field(description="The original model, exported the same way.")
    engine: Timing = Field(description="The reduced model.")
    speedup: Spread = Field(description="Baseline / engine of each round.")
    runs: Count = Field(description="Timed runs of each.")
    warmup: Count = Field(description="Untimed runs of each before.")
    interleaved: bool = Field(description="Whether the two took turns, so that drift of the machine hits both.")
    seed: int = Field(description="Seed of the order within a round (and of random inputs).")
    threads: Count = Field(description="Intra-op threads; 0 = the runtime's default.")
    shapes: dict[str, tuple[int, ...]] = Field(description="Input shapes.")
    runtime: str = Field(description="Runtime and provider, for instance onnxruntime 1.31 CPUExecutionProvider.")
    batch_size: Count | None = Field(default=None, description="Samples per run, for throughput.")


class PeakMemory(Part):
    """Largest resident memory of a process that loads and runs the engine once."""

    baseline_bytes: Count = Field(description="The original model.")
    engine_bytes: Count = Field(description="The reduced model.")
    how: str = Field(description="How it was measured.")


class BreakEvenPoint(Part):
    """One shape at which engine and baseline were compared."""

    shapes: dict[str, tuple[int, ...]] = Field(description="Input shapes.")
    label: str = Field(default="", description="Short form for a table, for instance `batch 8`.")
    tokens: Count | None = Field(default=None, description="Tokens that enter the first reduced block.")
    ratio: Spread = Field(description="Baseline time / engine time; below 1 the policy loses.")
    runs: Count = Field(description="Timed runs of each.")

    @property
    def pays(self) -> bool:
        """True when the engine is faster at this shape."""
        return self.ratio.median > 1


class GateResult(Part):
    """One acceptance condition."""

    expression: str = Field(description="The gate as it was given, for instance top1_agreement>=0.98.")
    metric: str = Field(description="Metric it is about.")
    kind: Literal["accuracy", "speed"] = Field(description="Decides the exit code: 7 or 8.")
    threshold: float = Field(description="What was asked for.")
    value: float | None = Field(description="What was measured; None when it was not, which fails the gate.")
    passed: bool = Field(description="Whether the gate holds.")
    reason: str = Field(default="", description="Why there is no value, or why a value does not count.")


class Figure(Part):
    """A picture in the bundle."""

    name: str = Field(description="Stable name: tokens, latency, kept_images, kept_text, ...")
    path: str = Field(description="File, relative to the bundle.")
    dark_path: str | None = Field(default=None, description="The same for a dark background.")
    title: str = Field(description="Heading.")
    caption: str = Field(default="", description="What it shows and how it was made.")
    alt: str = Field(default="", description="Text for those who cannot see it.")
    wide: bool = Field(default=False, description="Needs the full width of the page.")


class KeptText(Part):
    """One text of the calibration data and what became of its tokens."""

    tokens: tuple[str, ...] = Field(description="Tokens as the tokenizer writes them.")
    gone_after: tuple[int | None, ...] = Field(description="Block after which a token is gone; None = kept to the end.")
    how: Literal["dropped", "merged", "reduced"] = Field(default="dropped", description="How tokens go.")

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.tokens) != len(self.gone_after):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.gone_after)} entries in gone_after")
        return self
