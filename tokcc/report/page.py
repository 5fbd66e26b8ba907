"""What ``report.html`` says: the report as headline, verdict, and rows that the template only has to lay out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from tokcc.report.contexts import (
    break_even_text,
    context_rows,
    needle_hint,
    needle_rows,
    needle_total,
    prompt_rows,
    text_rows,
    timed_call,
)
from tokcc.report.kept import readable
from tokcc.report.schema import Decoding, GateResult, KeptText, Report, Size
from tokcc.report.summary import (
    Row,
    bytes_text,
    count_text,
    grouped_rows,
    next_steps,
    sampled,
    seconds_text,
    shapes_text,
    spread_text,
    times,
    worst,
)
from tokcc.report.summary import (
    percent as percent_text,
)

__all__ = ["page_content"]

_NO_BREAK = "\N{NO-BREAK SPACE}"

_NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    lines: tuple[str, ...]
    tone: str = ""

    @property
    def long(self) -> bool:
        """True when the value needs a smaller type."""
        return len(self.value) > 9


def percent(value: float, *, digits: int = 1) -> str:
    """Format a fraction so that the sign stays with its number."""
    return percent_text(value, digits=digits).replace(" ", _NO_BREAK)


def page_content(report: Report, bundle: str) -> dict[str, Any]:
    """Return everything that the template shows, but for the pictures.

    Args:
        report: The report.
        bundle: How the user calls the bundle, for commands.
    """
    rows = grouped_rows(report.layers)
    totals = report.totals
    saved = 1 - totals.flops_after / totals.flops_before if totals.flops_before else None
    first = rows[0].tokens_in if rows else None
    return {
        "report": report,
        "facts": _facts(report),
        "verdict": _verdict(report),
        "cards": [_speed(report), _fidelity(report), _parity(report), _size(report)],
        "missed": [_gate(gate) for gate in report.gates if not gate.passed],
        "gates": [_gate(gate) for gate in report.gates],
        # Whoever reads this has the report open.
        "steps": [step for step in next_steps(report, bundle) if not step.command.startswith("tokcc report")],
        "texts": [_text(text) for text in report.texts],
        "rows": [_row(row, first) for row in rows],
        "with_kv": any(row.kv_before is not None for row in rows),
        "layers_hint": _layers_hint(report),
        "decoding": None if report.decoding is None else _decoding(report.decoding),
        "total": {
            "flops": f"{count_text(totals.flops_before)} → {count_text(totals.flops_after)}",
            "saved": _NOTHING if saved is None else percent(saved, digits=0),
            "shapes": shapes_text(totals.shapes),
        },
        "outputs": _outputs(report),
        "metrics": _metrics(report),
        "measured": _measured(report),
        "break_even": [
            {
                "label": point.label or shapes_text(point.shapes),
                "tokens": _NOTHING if point.tokens is None else point.tokens,
                "ratio": spread_text(point.ratio),
                "runs": point.runs,
            }
            for point in report.break_even
        ],
        "policy": yaml.safe_dump(report.policy.long_form, sort_keys=False, allow_unicode=True).strip()
        if report.policy.long_form
        else "",
        "stages": [(name, seconds_text(seconds)) for name, seconds in report.stages.items()],
        "footer": _footer(report),
    }


def _row(row: Row, first: Size | None) -> dict[str, Any]:
    same = row.tokens_in == row.tokens_out
    with_kv = row.kv_before is not None and row.kv_after is not None
    return {
        "layers": row.layers.replace("-", _NOTHING),
        "step": row.step,
        "site": row.site.replace("_", " "),
        "tokens": str(row.tokens_in) if same else f"{row.tokens_in} → {row.tokens_out}",
        "share": _share(row.tokens_out, first),
        "flops": f"{count_text(row.flops_before)} → {count_text(row.flops_after)}",
        "saved": _NOTHING if row.saved is None else percent(row.saved, digits=0),
        "kv": f"{bytes_text(row.kv_before or 0)} → {bytes_text(row.kv_after or 0)}" if with_kv else _NOTHING,
    }


def _share(tokens: Size, first: Size | None) -> float | None:
    if isinstance(tokens, int) and isinstance(first, int) and first:
        return round(100 * tokens / first, 1)
    return None


def _facts(report: Report) -> list[str]:
    model = report.model
    parameters = None if model.parameters is None else f"{count_text(model.parameters)} parameters"
    blocks = None if model.blocks is None else f"{model.blocks} blocks"
    return [fact for fact in (model.kind, model.task, parameters, blocks, model.dtype, _time(report.created)) if fact]


def _time(created: str) -> str:
    """Format ISO 8601 for people; anything else is shown as it is."""
    try:
        return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


def _verdict(report: Report) -> str:
    """Say in one sentence what the engine gains and costs."""
    latency, fidelity = report.latency, report.fidelity
    if latency is None:
        gain = "How much faster the engine is was not measured here"
        if report.totals.ideal_speedup is not None:
            gain += f"; by FLOPs it could be {times(report.totals.ideal_speedup)}"
    elif latency.speedup.median >= 1:
        gain = f"On this machine the engine is {times(latency.speedup.median)} as fast as the original{_where(report)}"
    else:
        slower = times(latency.speedup.median)
        gain = f"On this machine the engine is slower than the original{_where(report)} ({slower})"
    if fidelity is None:
        return f"{gain}. What it costs in accuracy was not measured: no calibration data was given."
    if fidelity.weights == "random":
        return f"{gain}. The weights are random, so its fidelity says nothing about a trained model."
    card = _fidelity(report)
    return f"{gain}. {card.label[0].upper()}{card.label[1:]} on {sampled(report)}: {card.value}."


def _speed(report: Report) -> _Card:
    totals, latency = report.totals, report.latency
    ideal = None if totals.ideal_speedup is None else f"ideal by FLOPs {times(totals.ideal_speedup)}"
    if latency is None:
        return _Card("Speedup", "not measured", (ideal,) if ideal else (), "warn")
    lines = [
        f"{seconds_text(latency.baseline.median)} → {seconds_text(latency.engine.median)} {_run(report)}",
        f"80 % of rounds: {times(latency.speedup.p10)} to {times(latency.speedup.p90)}",
    ]
    if ideal and totals.realised_over_ideal is not None:
        lines.append(f"{ideal}, {percent(totals.realised_over_ideal, digits=0)} of it realised")
    speedup = latency.speedup
    tone = "good" if speedup.p10 > 1 else "warn" if speedup.median > 1 else "bad"
    return _Card("Speedup, measured", times(speedup.median), tuple(lines), tone)


def _fidelity(report: Report) -> _Card:
    fidelity = report.fidelity
    if fidelity is None:
        return _Card("Fidelity", "not measured", ("give calibration data to measure it",), "warn")
    low = worst(fidelity)
    broken = sum(output.nonfinite_samples for output in fidelity.outputs)
    missed = any(gate.kind == "accuracy" and not gate.passed for gate in report.gates)
    tone = "bad" if missed or broken else "warn" if fidelity.weights == "random" else "good" if report.gates else ""
    cosine = (
        "" if low is None or low.cosine_mean is None else f"cosine {low.cosine_mean:.4f}, worst {low.cosine_min:.4f}"
    )
    against = f"{sampled(report)}, against the baseline engine"
    tops = [output.top1_agreement for output in fidelity.outputs if output.top1_agreement is not None]
    lines = [f"{broken} samples gave NaN or infinity"] if broken else []
    if fidelity.metrics:
        metric = fidelity.metrics[0]
        value = " → ".join(_metric(metric.name, number) for number in (metric.before, metric.after))
        lines += [f"top-1 agreement {percent(min(tops))}"] if tops else []
        return _Card(metric.name.capitalize(), value, (*lines, cosine, against), tone)
    if tops:
        return _Card("Same top-1 answer", percent(min(tops)), (*lines, cosine, against), tone)
    if low is None or low.cosine_mean is None or low.cosine_min is None:
        return _Card("Fidelity", "no value", (*lines, against), "bad")
    return _Card("Cosine similarity", f"{low.cosine_mean:.4f}", (*lines, f"worst {low.cosine_min:.4f}", against), tone)


def _parity(report: Report) -> _Card:
    parity = report.parity
    if not parity.passed:
        return _Card("Parity", "failed", ("the engine does not compute what the policy says",), "bad")
    scale = max((check.scale for check in parity.checks), default=None)
    lines = [f"engine equals the {parity.reference}", f"{parity.batches} batches of {parity.inputs} inputs"]
    if parity.max_abs_diff is not None and scale is not None:
        lines.append(f"largest difference {parity.max_abs_diff:.2g} at a scale of {scale:.2g}")
    return _Card("Parity", "passed", tuple(lines), "good")


def _where(report: Report) -> str:
    what = timed_call(report.decoding) if report.decoding else None
    return "" if what is None else f" for {what}"


def _run(report: Report) -> str:
    return (timed_call(report.decoding) if report.decoding else None) or "a run"


def _cache(decoding: Decoding) -> _Card:
    last = decoding.points[-1]
    lines = [
        f"{bytes_text(last.cache_bytes_before)} → {bytes_text(last.cache_bytes_after)} after {last.context} tokens",
        f"bytes moved in a step allow {times(last.bound)}",
        break_even_text(decoding),
    ]
    needles = needle_total(decoding)
    if needles is not None:
        lines.append(f"copied needles {' → '.join(needles)}")
    return _Card("KV cache left", percent(last.cache_ratio), tuple(lines), "good" if last.cache_ratio < 1 else "warn")


def _decoding(decoding: Decoding) -> dict[str, Any]:
    depths, needles = needle_rows(decoding)
    return {
        "contexts": context_rows(decoding),
        "contexts_hint": (
            f"Both engines read the same tokens ({decoding.tokens}) in pieces of {decoding.piece}, in turns; entries "
            "are evicted after each. A token is timed at every context; its cache is what the reading left, with all "
            "that is carried beside keys and values. The first token comes when the context is read. By bytes moved: "
            f"weights ({bytes_text(decoding.weight_bytes_before)}) and cache, read once, before / after. In all: "
            f"{break_even_text(decoding)}."
        ),
        "prompts": prompt_rows(decoding),
        "prompts_hint": (
            f"Prompts of {decoding.tokens} in one call, engines in turns. In all: {break_even_text(decoding)}."
        ),
        "text": text_rows(decoding),
        "text_hint": (
            f"The first tokens of the text, read in pieces of {decoding.piece} as a server with chunked prefill does; "
            "the perplexity is that of all tokens but the first."
        ),
        "depths": depths,
        "needles": needles,
        "needles_hint": needle_hint(decoding) if needles else "",
    }


def _layers_hint(report: Report) -> str:
    shapes = shapes_text(report.totals.shapes) or "the shapes of the example inputs"
    if any(row.kv_bytes_before is not None for row in report.layers):
        return (
            f"Slots of the cache and FLOPs of the attention over it, for one token, at {shapes}. "
            "The whole model includes everything else."
        )
    return f"FLOPs of a whole block, with the inserted nodes, at {shapes}. The whole model includes embedding and head."


def _size(report: Report) -> _Card:
    if report.decoding is not None and report.decoding.points:
        return _cache(report.decoding)
    totals = report.totals
    lines = []
    if report.memory is not None:
        memory = f"{bytes_text(report.memory.baseline_bytes)} → {bytes_text(report.memory.engine_bytes)}"
        lines.append(f"peak memory {memory}")
    if totals.inserted_seconds is not None:
        share = "" if totals.inserted_share is None else f", {percent(totals.inserted_share)} of a run"
        lines.append(f"inserted nodes take {seconds_text(totals.inserted_seconds)}{share}")
    if report.nodes is not None:
        lines.append(f"{report.nodes.baseline} → {report.nodes.engine} graph nodes")
    saved = 1 - totals.flops_after / totals.flops_before if totals.flops_before else 0.0
    return _Card("FLOPs saved", percent(saved, digits=0), tuple(lines))


def _gate(gate: GateResult) -> dict[str, Any]:
    value = "" if gate.value is None else f"measured {gate.value:.4g}"
    text = ", ".join(part for part in (value, gate.reason) if part)
    return {"expression": gate.expression, "passed": gate.passed, "text": text}


def _text(text: KeptText) -> dict[str, Any]:
    left = sum(gone is None for gone in text.gone_after)
    return {"words": readable(text), "left": left, "total": len(text.tokens), "how": text.how}


def _outputs(report: Report) -> list[dict[str, str]]:
    if report.fidelity is None:
        return []

    def show(value: float | None, form: str) -> str:
        return _NOTHING if value is None else format(value, form)

    return [
        {
            "name": output.output,
            "cosine": show(output.cosine_mean, ".5f"),
            "worst": show(output.cosine_min, ".5f"),
            "error": _NOTHING if output.relative_error_mean is None else percent(output.relative_error_mean, digits=2),
            "top1": _NOTHING if output.top1_agreement is None else percent(output.top1_agreement),
            "kl": show(output.kl, ".3g"),
        }
        for output in report.fidelity.outputs
    ]


def _metrics(report: Report) -> list[dict[str, str]]:
    metrics = report.fidelity.metrics if report.fidelity else ()
    return [
        {
            "name": metric.name.capitalize(),
            "samples": f"{metric.samples} {'tokens' if metric.name == 'perplexity' else 'samples'}",
            "before": _metric(metric.name, metric.before),
            "after": _metric(metric.name, metric.after),
        }
        for metric in metrics
    ]


def _metric(name: str, value: float) -> str:
    return percent(value) if name == "accuracy" else f"{value:.4g}"


def _measured(report: Report) -> list[tuple[str, str]]:
    machine, latency = report.machine, report.latency
    lines = []
    if latency is not None:
        order = "in turns, in random order within a round" if latency.interleaved else "one after the other"
        lines += [
            ("Latency", f"{latency.runs} runs of each engine after {latency.warmup} to warm up, {order}; medians"),
            ("Speedup", "baseline / engine of each round; the median, and the 10th to 90th percentile"),
            ("Input shapes", shapes_text(latency.shapes)),
            ("Runtime", f"{latency.runtime}, {latency.threads or 'default number of'} threads, seed {latency.seed}"),
        ]
    if report.totals.inserted_how:
        lines.append(("Inserted nodes", report.totals.inserted_how))
    if report.memory is not None:
        lines.append(("Peak memory", report.memory.how))
    if report.fidelity is not None:
        lines.append(("Fidelity data", sampled(report)))
    memory = "" if machine.memory_bytes is None else f", {bytes_text(machine.memory_bytes)} memory"
    lines.append(("Machine", f"{machine.cpu}, {machine.cores} cores{memory}, {machine.os}"))
    if machine.gpu:
        lines.append(("GPU", machine.gpu))
    versions = [f"Python {machine.python}", *(f"{name} {version}" for name, version in machine.versions.items())]
    lines.append(("Versions", ", ".join(versions)))
    return lines


def _footer(report: Report) -> str:
    version = report.machine.versions.get("tokcc", "")
    made = f"Made by tokcc {version}".strip()
    return f"{made}{', ' + _time(report.created) if report.created else ''}. The same numbers are in report.json."
