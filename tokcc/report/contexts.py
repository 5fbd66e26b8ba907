"""What a report says of a decoder in a few words: by context, on a text, on needles."""

from __future__ import annotations

from dataclasses import dataclass

from tokcc.report.decoding import ContextPoint, Decoding, NeedlePoint, TextPoint
from tokcc.report.summary import bytes_text, percent, seconds_text, spread_text, times

__all__ = [
    "ContextRow",
    "NeedleRow",
    "PromptRow",
    "TextRow",
    "break_even_text",
    "context_rows",
    "needle_hint",
    "needle_rows",
    "needle_total",
    "prompt_rows",
    "rate_text",
    "text_rows",
    "timed_call",
]

_WEAK = 0.5
"""Share of a copy below which the model itself is no judge."""


@dataclass(frozen=True)
class ContextRow:
    """A line of the table by context; pairs are before and after."""

    context: str
    speed: tuple[str, str]
    speedup: str
    first_token: tuple[str, str]
    cache: tuple[str, str]
    left: str
    bound: str


@dataclass(frozen=True)
class PromptRow:
    """A line of the table of prompts."""

    tokens: str
    seconds: tuple[str, str]
    speedup: str


@dataclass(frozen=True)
class TextRow:
    """A line of the table on a text."""

    context: str
    perplexity: tuple[str, str]
    ratio: str
    top1: str
    kl: str


@dataclass(frozen=True)
class NeedleRow:
    """A line of the table of needles: a context, with a cell for each depth."""

    context: str
    cells: tuple[str, ...]
    hits: tuple[str, str]


def context_rows(decoding: Decoding) -> list[ContextRow]:
    """Return the table by context."""
    return [_context(point) for point in decoding.points]


def _context(point: ContextPoint) -> ContextRow:
    return ContextRow(
        context=str(point.context),
        speed=(rate_text(point.tokens_per_second_before), rate_text(point.tokens_per_second_after)),
        speedup=spread_text(point.speedup),
        first_token=(seconds_text(point.first_token_before), seconds_text(point.first_token_after)),
        cache=(bytes_text(point.cache_bytes_before), bytes_text(point.cache_bytes_after)),
        left=percent(point.cache_ratio),
        bound=times(point.bound),
    )


def prompt_rows(decoding: Decoding) -> list[PromptRow]:
    """Return the table of prompts in one call."""
    return [
        PromptRow(
            str(p.tokens), (seconds_text(p.seconds_before), seconds_text(p.seconds_after)), spread_text(p.speedup)
        )
        for p in decoding.prompts
    ]


def timed_call(decoding: Decoding) -> str | None:
    """Say what the headline figure is about; None where nothing was timed."""
    if decoding.prompts:
        return f"a prompt of {decoding.prompts[-1].tokens} tokens"
    return f"a token after {decoding.points[-1].context}" if decoding.points else None


def rate_text(value: float) -> str:
    """Format tokens a second."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text_rows(decoding: Decoding) -> list[TextRow]:
    """Return the table on a text."""
    return [_text(point) for point in decoding.text]


def _text(point: TextPoint) -> TextRow:
    before, after = point.perplexity_before, point.perplexity_after
    return TextRow(
        context=str(point.context),
        perplexity=(_number(before), _number(after)),
        ratio="-" if before is None or after is None else f"{after / before:.4f}",
        top1="-" if point.top1_agreement is None else percent(point.top1_agreement),
        kl=_number(point.kl),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def needle_rows(decoding: Decoding) -> tuple[list[str], list[NeedleRow]]:
    """Return the depths, and the table of needles by context."""
    depths = sorted({point.depth for point in decoding.needles})
    rows = []
    for context in dict.fromkeys(point.context for point in decoding.needles):
        mine = {point.depth: point for point in decoding.needles if point.context == context}
        cells = tuple(_needle(mine.get(depth)) for depth in depths)
        rows.append(NeedleRow(str(context), cells, _hits(tuple(mine.values()))))
    return [percent(depth, digits=0) for depth in depths], rows


def _needle(point: NeedlePoint | None) -> str:
    return "-" if point is None else f"{point.hits_before} → {point.hits_after}"


def _hits(points: tuple[NeedlePoint, ...]) -> tuple[str, str]:
    asked = sum(point.predictions for point in points)
    before, after = sum(point.hits_before for point in points), sum(point.hits_after for point in points)
    return percent(before / asked, digits=0), percent(after / asked, digits=0)


def needle_total(decoding: Decoding) -> tuple[str, str] | None:
    """Return the share of copied tokens that are predicted, before and after; None without needles."""
    return _hits(decoding.needles) if any(point.predictions for point in decoding.needles) else None


def needle_hint(decoding: Decoding) -> str:
    """Say how needles are asked for, and whether the model is any good at it."""
    asked = decoding.needles[0].predictions
    hint = (
        "A span of random tokens lies in the context and comes again at its end. Counted are those of the "
        f"{asked} tokens behind its beginning that are the first guess after the true ones: copying, not understanding."
    )
    before = sum(point.hits_before for point in decoding.needles)
    if before < _WEAK * sum(point.predictions for point in decoding.needles):
        hint += " The model with its whole cache copies little, so this says little about the smaller one."
    return hint


def break_even_text(decoding: Decoding) -> str:
    """Say from which length of prompts, or which context on, the engine is faster."""
    if decoding.prompts:
        first, last = decoding.prompts[0].tokens, decoding.prompts[-1].tokens
        if decoding.prompt_break_even is None:
            return f"prompts are read no faster at any length up to {last} tokens"
        every = "at every measured length, " if decoding.prompt_break_even == first else ""
        return f"prompts are read faster {every}from {decoding.prompt_break_even} tokens on"
    if not decoding.points:
        return "not measured"
    if decoding.break_even is None:
        return f"the engine is not faster at any context up to {decoding.points[-1].context} tokens"
    if decoding.break_even == decoding.points[0].context:
        return f"faster at every measured context, from {decoding.break_even} tokens on"
    return f"faster from a context of {decoding.break_even} tokens on"
