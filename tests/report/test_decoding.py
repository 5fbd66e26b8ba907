"""The part of a report that only decoders have: its shape, its words, its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.report import samples
from tokcc.report.cache_figures import draw_occupancy, draw_speed
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
from tokcc.report.findings import findings
from tokcc.report.schema import (
    ContextPoint,
    Decoding,
    LayerOccupancy,
    LayerRow,
    NeedlePoint,
    Occupancy,
    PromptPoint,
    Report,
    Spread,
    TextPoint,
)
from tokcc.report.style import DARK, LIGHT
from tokcc.report.summary import grouped_rows, shapes_text
from tokcc.report.terminal import to_text
from tokcc.report.write import write_report


def point(context: int, ratio: float, left: float = 0.25) -> ContextPoint:
    return ContextPoint(
        context=context,
        seconds_before=0.04 * ratio,
        seconds_after=0.04,
        tokens_per_second_before=25 / ratio,
        tokens_per_second_after=25,
        speedup=Spread(median=ratio, p10=ratio * 0.9, p90=ratio * 1.1),
        runs=9,
        first_token_before=context / 100,
        first_token_after=context / 200,
        cache_bytes_before=context * 1000,
        cache_bytes_after=round(context * 1000 * left),
        bound=1.2,
    )


def needle(context: int, depth: float, before: int, after: int) -> NeedlePoint:
    where = round(context * depth)
    return NeedlePoint(
        context=context, depth=depth, position=where, predictions=12, hits_before=before, hits_after=after
    )


def decoding(**changes: object) -> Decoding:
    content = Decoding(
        tokens="a.txt",
        piece=256,
        weight_bytes_before=5_000_000,
        weight_bytes_after=5_000_000,
        points=(point(512, 0.9), point(1024, 1.3)),
        break_even=1024,
        text=(
            TextPoint(
                context=1024,
                predicted=1023,
                perplexity_before=10,
                perplexity_after=10.5,
                top1_agreement=0.97,
                kl=0.01,
            ),
            TextPoint(context=2048, predicted=2047),
        ),
        needles=(needle(512, 0.1, 12, 12), needle(512, 0.5, 10, 6), needle(1024, 0.1, 11, 0)),
        occupancy=Occupancy(
            context=10,
            cell=4,
            layers=tuple(LayerOccupancy(layer=i, kept=(1.0, 0.25, 1.0)) for i in (0, 2)),
        ),
    )
    return content.model_copy(update=changes)


def report(**changes: object) -> Report:
    rows = tuple(
        LayerRow(
            layer=i,
            site="cache",
            step="h2o",
            tokens_in=1024,
            tokens_out=256 if i < 3 else 128,
            flops_before=100,
            flops_after=25,
            bytes_before=8,
            bytes_after=2,
            kv_bytes_before=8,
            kv_bytes_after=2,
        )
        for i in range(4)
    )
    return samples.report().model_copy(update={"decoding": decoding(**changes), "layers": rows, "texts": ()})


def test_rows() -> None:
    first, last = context_rows(decoding())
    assert first.context == "512"
    assert first.speed == ("27.8", "25")
    assert first.first_token == ("5.12 s", "2.56 s")
    assert last.cache == ("1.02 MB", "256 KB")
    assert last.left == "25.0 %"
    one, two = text_rows(decoding())
    assert (one.perplexity, one.ratio, one.top1) == (("10", "10.5"), "1.0500", "97.0 %")
    assert (two.perplexity, two.ratio, two.top1, two.kl) == (("-", "-"), "-", "-", "-")
    depths, needles = needle_rows(decoding())
    assert depths == ["10 %", "50 %"]
    assert [row.cells for row in needles] == [("12 → 12", "10 → 6"), ("11 → 0", "-")]
    assert needles[0].hits == ("92 %", "75 %")
    assert needle_total(decoding()) == ("92 %", "50 %")
    assert needle_total(decoding(needles=())) is None


def test_a_model_that_does_not_copy_is_no_judge() -> None:
    assert "says little" not in needle_hint(decoding())
    assert "says little" in needle_hint(decoding(needles=(needle(512, 0.1, 2, 1),)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "faster from a context of 1024 tokens on"),
        ({"break_even": 512}, "faster at every measured context, from 512 tokens on"),
        ({"break_even": None}, "the engine is not faster at any context up to 1024 tokens"),
        ({"points": ()}, "not measured"),
    ],
)
def test_break_even(changes: dict[str, object], text: str) -> None:
    assert break_even_text(decoding(**changes)) == text


def prompt(tokens: int, ratio: float) -> PromptPoint:
    spread = Spread(median=ratio, p10=ratio * 0.9, p90=ratio * 1.1)
    return PromptPoint(tokens=tokens, seconds_before=2 * ratio, seconds_after=2, speedup=spread, runs=3)


@pytest.mark.parametrize(
    ("ratios", "found", "text"),
    [
        ((0.9, 1.3), 1024, "prompts are read faster from 1024 tokens on"),
        ((1.1, 1.3), 512, "prompts are read faster at every measured length, from 512 tokens on"),
        ((0.8, 0.9), None, "prompts are read no faster at any length up to 1024 tokens"),
    ],
)
def test_prompts_are_what_counts_where_they_were_timed(
    ratios: tuple[float, float], found: int | None, text: str
) -> None:
    content = decoding(prompts=(prompt(512, ratios[0]), prompt(1024, ratios[1])), prompt_break_even=found)
    assert break_even_text(content) == text
    assert timed_call(content) == "a prompt of 1024 tokens"
    assert timed_call(decoding()) == "a token after 1024"
    row = prompt_rows(content)[1]
    assert (row.tokens, row.speedup.split()[0]) == ("1024", f"{ratios[1]:.2f}x")
    shown = to_text(samples.report(decoding=content), bundle="out")
    assert text in shown
    assert "in one call" in shown


def test_cells_have_to_cover_the_prompt() -> None:
    with pytest.raises(ValidationError, match="layer 5 has 2 cells, 3 are needed"):
        Occupancy(context=10, cell=4, layers=(LayerOccupancy(layer=5, kept=(1.0, 0.0)),))


def test_equal_caches_become_one_line() -> None:
    rows = grouped_rows(report().layers)
    assert [(row.layers, row.tokens_out, row.kv_before) for row in rows] == [("0-2", 256, 24), ("3", 128, 8)]


def test_shapes_of_caches_are_only_counted() -> None:
    shapes = {"input_ids": (1, 1), "past_key_values.0.key": (1, 2, 3, 4), "past_key_values.0.value": (1, 2, 3, 4)}
    assert shapes_text(shapes) == "input_ids [1, 1], 2 cache tensors"


def test_page_and_summary(tmp_path: Path) -> None:
    made = write_report(report(), tmp_path)
    assert [figure.name for figure in made.figures] == ["latency", "contexts", "occupancy"]
    page = (tmp_path / "report.html").read_text()
    for words in ("By length of the context", "On the text", "Copied needles", "25.0", "92 % → 50 %", "64 tokens of"):
        assert words in page.replace("\u00a0", " ")
    assert Report.load(tmp_path / "report.json") == made
    text = to_text(made, bundle="out")
    for words in ("faster from a context of 1024 tokens on", "92 % -> 50 %", "1.02 MB -> 256 KB", "10 -> 10.5"):
        assert words in text


def test_figures() -> None:
    for theme in (LIGHT, DARK):
        occupancy = decoding().occupancy
        assert occupancy is not None
        assert draw_occupancy(occupancy, theme).startswith(b"\x89PNG")
        assert b"whole cache" in draw_speed(decoding().points, theme)


def test_caches_that_are_not_smaller() -> None:
    wide = report(points=(point(512, 1.1, left=1.0),))
    assert any("not smaller after 512 tokens" in warning for warning in findings(wide))
    assert not any("not smaller" in warning for warning in findings(report()))


def test_nothing_without_parity() -> None:
    content = report().model_dump()
    content["parity"]["passed"] = False
    with pytest.raises(ValidationError, match="decoding reported although parity did not pass"):
        Report.model_validate({**content, "fidelity": None, "latency": None, "memory": None})
