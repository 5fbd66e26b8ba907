"""The pictures that only decoders have: speed over contexts, and what caches keep of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokcc.report.contexts import rate_text
from tokcc.report.decoding import ContextPoint, Occupancy
from tokcc.report.style import Theme, new_figure, styled, to_png, to_svg

__all__ = ["draw_occupancy", "draw_speed"]

_WIDTH = 5.2


def draw_speed(points: Sequence[ContextPoint], theme: Theme) -> bytes:
    """Draw tokens a second over the context, and what the bytes that are moved would allow."""
    xs = [point.context for point in points]
    lines = (
        ("whole cache", [p.tokens_per_second_before for p in points], theme.baseline),
        ("engine", [p.tokens_per_second_after for p in points], theme.engine),
    )
    bound = [p.tokens_per_second_before * p.bound for p in points]
    with styled(theme):
        from matplotlib.ticker import NullFormatter

        figure = new_figure(_WIDTH, 2.7)
        axes = figure.add_subplot()
        axes.plot(xs, bound, color=theme.engine, linewidth=1.2, linestyle=(0, (2, 2)), alpha=0.8)
        for _, ys, colour in lines:
            axes.plot(xs, ys, color=colour, linewidth=2.2, marker="o", markersize=4.5)
        top = max(*bound, *lines[0][1], *lines[1][1])
        ends = _apart([ys[-1] for _, ys, _ in lines], 0.09 * top)
        for (name, ys, colour), height in zip(lines, ends, strict=True):
            axes.annotate(
                f"{name}\n{rate_text(ys[-1])}", (xs[-1], height), (8, 0), textcoords="offset points", va="center",
                color=colour, linespacing=1.3, annotation_clip=False,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(ylim=(0, top * 1.08), xlabel="tokens in front", ylabel="tokens a second")
        axes.grid(axis="y")
        return to_svg(figure)


def _apart(heights: Sequence[float], room: float) -> list[float]:
    """Move two labels away from each other where they would touch."""
    one, two = heights
    if abs(one - two) >= 2 * room:
        return [one, two]
    middle, sign = (one + two) / 2, 1 if one >= two else -1
    return [middle + sign * room, middle - sign * room]


def draw_occupancy(occupancy: Occupancy, theme: Theme) -> bytes:
    """Draw, layer by layer, which positions of a prompt are left: the darker, the more heads keep them."""
    from matplotlib.colors import LinearSegmentedColormap

    shares = np.array([row.kept for row in occupancy.layers])
    layers = [row.layer for row in occupancy.layers]
    with styled(theme):
        figure = new_figure(8.4, 1.35 + 0.13 * max(len(layers), 6))
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("kept", [theme.line, theme.engine])
        edges = np.minimum(np.arange(shares.shape[1] + 1) * occupancy.cell, occupancy.context)
        mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), shares, cmap=colours, vmin=0, vmax=1)
        axes.invert_yaxis()
        step = max(1, -(-len(layers) // 12))
        axes.set_yticks(np.arange(len(layers))[::step] + 0.5, [str(layer) for layer in layers[::step]])
        axes.set(xlabel="position in the prompt", ylabel="block", xlim=(0, occupancy.context))
        bar = figure.colorbar(mesh, ax=axes, shrink=0.9, aspect=36, pad=0.015, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["gone", "half", "all"])
        bar.outline.set_visible(False)
        return to_png(figure)
