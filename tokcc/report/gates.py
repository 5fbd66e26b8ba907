"""Gates: conditions a compile must meet, such as ``top1_agreement>=0.98`` or ``speedup>=1.2``.

A metric that was not measured fails its gate and says why: a gate must never pass because nobody looked.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokcc.errors import UsageError
from tokcc.report.schema import GateResult, OutputFidelity, Report, TaskMetric

__all__ = ["METRICS", "Gate", "Metric", "evaluate_gates", "parse_gates"]

Gates: TypeAlias = Mapping[str, str | float] | Iterable[str] | str | None

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(?P<op>>=|<=|>|<)\s*(?P<value>\S+)\s*")
_EXPRESSION = re.compile(r"\s*(?P<metric>[^<>=\s]+)(?P<condition>\s*[<>].*)", re.DOTALL)


@dataclass(frozen=True)
class Metric:
    """Something a gate can be about.

    Attributes:
        name: What the user writes.
        kind: Accuracy gates exit with 7, speed gates with 8.
        needs: What must be measured for it: `calibration`, `labels`, `latency`, `memory`, or nothing.
        higher_is_better: Decides what a bare number means, and which output is the worst.
        doc: One line for ``--help``.
        of_output: How to read it from one output's fidelity, for per-output metrics.
        of_report: How to read it from the report, for the others.
    """

    name: str
    kind: Literal["accuracy", "speed"]
    needs: str
    higher_is_better: bool
    doc: str
    of_output: Callable[[OutputFidelity], float | None] | None = None
    of_report: Callable[[Report], float | None] | None = None


def _task(name: str, read: Callable[[TaskMetric], float]) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        metrics = report.fidelity.metrics if report.fidelity else ()
        found = [read(metric) for metric in metrics if metric.name == name]
        worst = min if name == "accuracy" else max
        return worst(found, default=None)

    return value


def _drop(report: Report) -> float | None:
    metrics = report.fidelity.metrics if report.fidelity else ()
    return max((m.before - m.after for m in metrics if m.name == "accuracy"), default=None)


def _perplexity_ratio(report: Report) -> float | None:
    metrics = report.fidelity.metrics if report.fidelity else ()
    return max((m.after / m.before for m in metrics if m.name == "perplexity" and m.before > 0), default=None)


def _speedup(report: Report) -> float | None:
    return report.latency.speedup.median if report.latency else None


def _latency_ms(report: Report) -> float | None:
    return report.latency.engine.median * 1e3 if report.latency else None


def _memory_ratio(report: Report) -> float | None:
    memory = report.memory
    return memory.engine_bytes / memory.baseline_bytes if memory and memory.baseline_bytes else None


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("cosine", "accuracy", "calibration", True, "mean cosine similarity", of_output=lambda o: o.cosine_mean),
        Metric(
            "cosine_min", "accuracy", "calibration", True, "worst sample's cosine", of_output=lambda o: o.cosine_min
        ),
        Metric(
            "relative_error",
            "accuracy",
            "calibration",
            False,
            "mean relative L2 error",
            of_output=lambda o: o.relative_error_mean,
        ),
        Metric(
            "top1_agreement",
            "accuracy",
            "calibration",
            True,
            "share of rows whose largest entry is the same",
            of_output=lambda o: o.top1_agreement,
        ),
        Metric("kl", "accuracy", "calibration", False, "mean KL divergence in nats", of_output=lambda o: o.kl),
        Metric(
            "accuracy",
            "accuracy",
            "labels",
            True,
            "accuracy of the engine",
            of_report=_task("accuracy", lambda m: m.after),
        ),
        Metric(
            "accuracy_drop", "accuracy", "labels", False, "accuracy of the baseline less the engine's", of_report=_drop
        ),
        Metric(
            "perplexity",
            "accuracy",
            "calibration",
            False,
            "perplexity of the engine",
            of_report=_task("perplexity", lambda m: m.after),
        ),
        Metric(
            "perplexity_ratio",
            "accuracy",
            "calibration",
            False,
            "perplexity of the engine / the baseline",
            of_report=_perplexity_ratio,
        ),
        Metric(
            "max_abs_diff",
            "accuracy",
            "",
            False,
            "largest difference between engine and eager oracle",
            of_report=lambda r: r.parity.max_abs_diff,
        ),
        Metric("speedup", "speed", "latency", True, "median of baseline time / engine time", of_report=_speedup),
        Metric("latency_ms", "speed", "latency", False, "median milliseconds of the engine", of_report=_latency_ms),
        Metric("ideal_speedup", "speed", "", True, "FLOPs before / after", of_report=lambda r: r.totals.ideal_speedup),
        Metric(
            "memory_ratio",
            "speed",
            "memory",
            False,
            "peak memory of the engine / the baseline",
            of_report=_memory_ratio,
        ),
    )
}
"""Every metric a gate can name."""

_NOT_MEASURED = {
    "calibration": "not measured: give calibration data (--calib PATH)",
    "labels": "not measured: give calibration data with labels (class sub-folders, or `labels` in an .npz)",
    "latency": "not measured: calibration is off, or the engine does not run here",
    "memory": "not measured: peak memory is measured on Linux only",
}


@dataclass(frozen=True)
class Gate:
    """A parsed gate.

    Attributes:
        expression: As the user wrote it.
        metric: What it is about.
        output: Only this output; None = the worst output.
        op: Comparison.
        threshold: What is compared with.
    """

    expression: str
    metric: Metric
    output: str | None
    op: str
    threshold: float

    def holds(self, value: float) -> bool:
        """Return whether a value meets the gate."""
        return _OPERATORS[self.op](value, self.threshold)

    def evaluate(self, report: Report) -> GateResult:
        """Check the gate against a report."""
        value, reason = self._value(report)
        broken = self._nonfinite(report)
        if broken:
            reason = f"{broken} samples gave NaN or infinity"
        return GateResult(
            expression=self.expression,
            metric=self.metric.name,
            kind=self.metric.kind,
            threshold=self.threshold,
            value=value,
            passed=value is not None and not broken and self.holds(value),
            reason=reason,
        )

    def _nonfinite(self, report: Report) -> int:
        if self.metric.kind != "accuracy" or report.fidelity is None:
            return 0
        return sum(o.nonfinite_samples for o in report.fidelity.outputs if self.output in (None, o.output))

    def _value(self, report: Report) -> tuple[float | None, str]:
        reason = _NOT_MEASURED.get(self.metric.needs, "not measured")
        if self.metric.of_report is not None:
            value = self.metric.of_report(report)
            return value, "" if value is not None else reason
        if self.metric.of_output is None or report.fidelity is None:
            return None, reason
        outputs = report.fidelity.outputs
        if self.output is not None:
            outputs = tuple(o for o in outputs if o.output == self.output)
            if not outputs:
                known = ", ".join(o.output for o in report.fidelity.outputs)
                raise UsageError(f"gate {self.expression}: there is no output {self.output}", found=known or None)
        values = [value for o in outputs if (value := self.metric.of_output(o)) is not None]
        if not values:
            return None, f"no output has {self.metric.name} (it needs class or token scores, or finite values)"
        return (min(values) if self.metric.higher_is_better else max(values)), ""


def parse_gates(gates: Gates) -> tuple[Gate, ...]:
    """Read gates as users give them, so that mistakes show before a long compile and not after it.

    Args:
        gates: ``"speedup>=1.2"``, a list of such, or ``{"cosine": ">=0.98", "kl": 0.1}``, where a bare number is the
            bound on the side that makes sense. ``logits.cosine`` asks about one output; else the worst output counts.

    Raises:
        UsageError: An expression cannot be read, or names a metric that does not exist.
    """
    if gates is None:
        return ()
    if isinstance(gates, str):
        return (_parse(gates),)
    if isinstance(gates, Mapping):
        return tuple(_parse_pair(str(name), condition) for name, condition in gates.items())
    return tuple(_parse(expression) for expression in gates)


def evaluate_gates(report: Report, gates: Gates | Iterable[Gate]) -> list[GateResult]:
    """Check gates against a report; the caller raises ``GateError`` or ``SpeedGateError`` for those that fail."""
    if isinstance(gates, (str, Mapping)) or gates is None:
        return [gate.evaluate(report) for gate in parse_gates(gates)]
    return [(gate if isinstance(gate, Gate) else _parse(gate)).evaluate(report) for gate in gates]


def _parse(expression: object) -> Gate:
    match = _EXPRESSION.fullmatch(expression) if isinstance(expression, str) else None
    if match is None or not isinstance(expression, str):
        raise _malformed(str(expression))
    return _gate(expression.strip(), match["metric"], match["condition"])


def _parse_pair(name: str, condition: object) -> Gate:
    if isinstance(condition, bool) or not isinstance(condition, str | int | float):
        raise _malformed(f"{name}: {condition!r}")
    text = str(condition).strip()
    if _CONDITION.fullmatch(text) is None:
        metric, _ = _metric(name)
        text = (">=" if metric.higher_is_better else "<=") + text
    return _gate(f"{name.strip()}{text}", name.strip(), text)


def _gate(expression: str, name: str, condition: str) -> Gate:
    metric, output = _metric(name)
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise _malformed(expression)
    try:
        threshold = _number(match["value"])
    except ValueError as error:
        raise _malformed(expression) from error
    return Gate(expression, metric, output, match["op"], threshold)


def _number(text: str) -> float:
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _metric(name: str) -> tuple[Metric, str | None]:
    """Find the metric; an output's name may stand before it, and may itself contain dots."""
    name = name.strip()
    if name in METRICS:
        return METRICS[name], None
    output, dot, last = name.rpartition(".")
    metric = METRICS.get(last)
    if dot and output and metric is not None and metric.of_output is not None:
        return metric, output
    nearest = difflib.get_close_matches(last.lower(), METRICS, n=1, cutoff=0.5)
    raise UsageError(
        f"unknown gate metric {name}",
        needed=", ".join(METRICS),
        help=f"did you mean {nearest[0]}?" if nearest else "see `tokcc compile --help`",
    )


def _malformed(expression: str) -> UsageError:
    return UsageError(
        "cannot read a gate",
        needed="METRIC>=NUMBER (or <=, >, <)",
        found=expression or "nothing",
        help="for instance --gate 'top1_agreement>=0.98' (quote it: the shell reads > as a redirection)",
    )
