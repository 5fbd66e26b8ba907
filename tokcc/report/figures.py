"""The pictures of a report: drawn twice, for light and for dark pages.

Every function returns the bytes of a file. Charts are SVG, pictures PNG; nothing touches pyplot or global settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcc.report.distances import Array
from tokcc.report.kept import KeptTokens, paint, readable, spread_over
from tokcc.report.schema import BreakEvenPoint, KeptText, Latency, LayerRow
from tokcc.report.style import LIGHT, Theme, new_figure, styled, to_png, to_svg
from tokcc.report.summary import seconds_text, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "draw_break_even",
    "draw_kept_images",
    "draw_kept_text",
    "draw_latency",
    "draw_tokens",
    "show_pixels",
]

_WIDTH = 5.2
"""Inches of a chart: half of the page on a desk, nearly all of it on a telephone."""


def draw_tokens(layers: Sequence[LayerRow], theme: Theme) -> bytes:
    """Draw the tokens that enter and leave each block, as steps."""
    xs, ys = _token_steps(layers)
    first, last = ys[0], ys[-1]
    with styled(theme):
        figure = new_figure(_WIDTH, 2.7)
        axes = figure.add_subplot()
        axes.axhline(first, color=theme.baseline, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.fill_between(xs, ys, color=theme.engine, alpha=0.14, linewidth=0)
        axes.plot(xs, ys, color=theme.engine, linewidth=2.2, solid_joinstyle="miter")
        room = (xs[-1] - xs[0]) * 0.02
        axes.text(xs[-1] + room, first, f"{first}\noriginal", color=theme.muted, va="center", linespacing=1.35)
        if last != first:
            label = f"{last}\n{last / first - 1:+.0%}".replace("-", "\N{MINUS SIGN}").replace("%", " %")
            # Two labels need room between them, whatever the numbers are.
            height = min(max(last, first * 0.1), first * 0.8)
            axes.text(
                xs[-1] + room, height, label, color=theme.engine, va="center", fontweight="bold", linespacing=1.35
            )
        axes.set(xlim=(xs[0], xs[-1]), ylim=(0, first * 1.08), xlabel="block", ylabel="tokens")
        axes.grid(axis="y")
        _integer_ticks(axes)
        return to_svg(figure)


def _token_steps(layers: Sequence[LayerRow]) -> tuple[list[float], list[int]]:
    """Corners of the step line: the steps of a block share its unit of the axis."""
    xs: list[float] = []
    ys: list[int] = []
    for layer in sorted({row.layer for row in layers}):
        rows = [row for row in layers if row.layer == layer]
        width = 1 / (len(rows) + 1)
        for position, row in enumerate(rows):
            middle = layer - 0.5 + (position + 1) * width
            xs += [middle - width, middle, middle]
            ys += [int(row.tokens_in), int(row.tokens_in), int(row.tokens_out)]
        xs.append(layer + 0.5)
        ys.append(int(rows[-1].tokens_out))
    return xs, ys


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def draw_latency(latency: Latency, theme: Theme) -> bytes:
    """Draw every run of both engines, with the median and the span from p10 to p90."""
    unit, factor = ("s", 1.0) if latency.baseline.median >= 1 else ("ms", 1e3)
    rows = (("baseline", latency.baseline, theme.baseline), ("engine", latency.engine, theme.engine))
    with styled(theme):
        figure = new_figure(_WIDTH, 2.1)
        axes = figure.add_subplot()
        jitter = np.random.default_rng(0)
        for position, (_, timing, colour) in enumerate(rows):
            height = 1 - position
            median, p10, p90 = (value * factor for value in (timing.median, timing.p10, timing.p90))
            axes.barh(height, median, height=0.5, color=colour, alpha=0.22, linewidth=0)
            if timing.samples:
                ys = height + jitter.uniform(-0.17, 0.17, len(timing.samples))
                axes.scatter(np.asarray(timing.samples) * factor, ys, s=9, color=colour, alpha=0.45, linewidths=0)
            axes.hlines(height, p10, p90, color=colour, linewidth=2)
            axes.vlines(median, height - 0.25, height + 0.25, color=colour, linewidth=2.6)
            axes.annotate(
                seconds_text(timing.median), (0, height), (6, 0), textcoords="offset points", va="center",
                fontweight="bold", color=theme.text,
            )  # fmt: skip
        largest = max(max(timing.samples, default=timing.p90) for _, timing, _ in rows)
        usual = max(timing.p90 for _, timing, _ in rows)
        axes.set(xlim=(0, min(largest, usual * 1.3) * factor * 1.04), ylim=(-0.5, 1.5), xlabel=f"{unit} per run")
        axes.set_yticks([1, 0], [name for name, _, _ in rows])
        axes.tick_params(axis="y", labelcolor=theme.text)
        axes.grid(axis="x")
        return to_svg(figure)


def draw_break_even(points: Sequence[BreakEvenPoint], theme: Theme) -> bytes:
    """Draw the speedup over shapes, with its spread; left of the line at 1 the engine loses."""
    with styled(theme):
        figure = new_figure(_WIDTH, 0.9 + 0.36 * len(points))
        axes = figure.add_subplot()
        axes.axvline(1, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        for position, point in enumerate(reversed(points)):
            colour = theme.engine if point.pays else _LOSS
            axes.hlines(position, point.ratio.p10, point.ratio.p90, color=colour, linewidth=3, alpha=0.35)
            axes.plot(point.ratio.median, position, marker="o", markersize=7, color=colour)
            axes.annotate(
                times(point.ratio.median), (max(point.ratio.median, point.ratio.p90), position), (8, 0),
                textcoords="offset points", va="center", fontweight="bold", color=theme.text,
            )  # fmt: skip
        low = min(0.9, *(point.ratio.p10 for point in points))
        high = max(1.1, *(point.ratio.p90 for point in points))
        margin = (high - low) * 0.06
        axes.set(
            xlim=(low - margin, high + 4 * margin), ylim=(-0.6, len(points) - 0.4), xlabel="speedup (baseline / engine)"
        )
        axes.set_yticks(range(len(points)), [point.label or "?" for point in reversed(points)])
        axes.tick_params(axis="y", labelcolor=theme.text)
        axes.grid(axis="x")
        return to_svg(figure)


_LOSS = "#d55e00"


def draw_kept_images(
    images: Sequence[Array], stages: Sequence[KeptTokens], *, rows: int = 4, columns: int = 4
) -> bytes:
    """Draw photos with the patches that are left, reduction by reduction, for a page of any colour.

    Args:
        images: Pixels as the model sees them, uint8 ``[H, W, C]``, in the order of the samples.
        stages: What became of the tokens.
        rows: At most so many photos.
        columns: At most so many reductions, chosen evenly; the last one is always there.
    """
    chosen = spread_over([stage for stage in stages if stage.grid is not None], columns)
    shown = min([rows, len(images), *(stage.shape[0] for stage in chosen)])
    with styled(LIGHT):
        figure = new_figure(1.55 * (len(chosen) + 1), 1.55 * shown + 0.42)
        figure.patch.set_alpha(0)
        grid = figure.subplots(shown, len(chosen) + 1, squeeze=False)
        for row in range(shown):
            show_pixels(grid[row][0], images[row])
            for column, stage in enumerate(chosen, 1):
                show_pixels(grid[row][column], paint(images[row], stage, row))
        grid[0][0].set_title("input", fontsize=8.5, color=_ANY_PAGE, pad=6)
        for column, stage in enumerate(chosen, 1):
            total = stage.grid[0] * stage.grid[1] if stage.grid else 0
            label = f"block {stage.layer}\n{stage.count()} of {total}"
            grid[0][column].set_title(label, fontsize=8.5, color=_ANY_PAGE, pad=6, linespacing=1.3)
        return to_png(figure, dpi=120)


_ANY_PAGE = "#77808a"
"""Grey that can be read on white and on black: photos are too large to be kept twice."""


def show_pixels(axes: Axes, pixels: Array) -> None:
    """Put a picture into axes, without a frame."""
    axes.imshow(pixels, interpolation="antialiased", cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()


def draw_kept_text(texts: Sequence[KeptText], theme: Theme, *, width: float = 7.6) -> bytes:
    """Draw texts with the tokens that are gone in grey and struck out."""
    with styled(theme), _any_glyph():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = new_figure(width, 1.0)
        figure.set_layout_engine("none")
        canvas: Any = FigureCanvasAgg(figure)
        figure.set_dpi(144)
        renderer = canvas.get_renderer()
        lines = _laid_out(texts, figure, renderer, width * 144 - 36)
        height = len(lines) * _LINE + 28
        figure.set_size_inches(width, height / 144)
        for number, line in enumerate(lines):
            y = height - 14 - (number + 0.75) * _LINE
            for piece in line:
                colour = theme.muted if piece.heading else theme.gone if piece.gone else theme.text
                figure.text(
                    (18 + piece.x) / (width * 144), y / height, piece.text, color=colour, fontsize=piece.size,
                    parse_math=False, fontstyle="italic" if piece.special else "normal",
                )  # fmt: skip
                if piece.gone:
                    _strike(
                        figure, (18 + piece.x) / (width * 144), (y + 8) / height, piece.width / (width * 144), theme
                    )
        return to_png(figure)


_LINE = 34
"""Pixels between lines of text, at 144 dpi."""


@dataclass(frozen=True)
class _Piece:
    text: str
    x: float
    width: float
    gone: bool
    special: bool = False
    heading: bool = False
    size: float = 10.5


def _laid_out(texts: Sequence[KeptText], figure: Any, renderer: Any, room: float) -> list[list[_Piece]]:
    """Break texts into lines of so many pixels."""
    measured: dict[str, float] = {}

    def width_of(text: str) -> float:
        if text not in measured:
            artist = figure.text(0, 0, text, fontsize=10.5, parse_math=False)
            measured[text] = artist.get_window_extent(renderer).width
            artist.remove()
        return measured[text]

    space = width_of("n n") - width_of("nn")
    lines: list[list[_Piece]] = []
    for position, text in enumerate(texts):
        if position:
            lines.append([])
        left = sum(gone is None for gone in text.gone_after)
        lines += [[_Piece(f"{left} of {len(text.tokens)} tokens left", 0, 0, False, heading=True, size=8.5)], []]
        x = 0.0
        for word in readable(text):
            width = width_of(word.text)
            x += space if word.space and x else 0
            if x and x + width > room:
                lines.append([])
                x = 0.0
            lines[-1].append(_Piece(word.text, x, width, word.gone_after is not None, special=word.special))
            x += width
    return lines


def _strike(figure: Any, x: float, y: float, width: float, theme: Theme) -> None:
    from matplotlib.lines import Line2D

    figure.add_artist(Line2D([x, x + width], [y, y], color=theme.gone, linewidth=0.8))


@contextmanager
def _any_glyph() -> Iterator[None]:
    """A token in a script that the font lacks is drawn as a box; that is no reason to stop a compile."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield
