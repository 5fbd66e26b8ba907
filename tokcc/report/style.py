"""How figures look: two themes, one palette, and matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "Theme", "new_figure", "styled", "to_png", "to_svg"]

_FONT = "DejaVu Sans"  # comes with matplotlib
_PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the same names as in the page's style sheet."""

    name: str
    background: str
    text: str
    muted: str
    line: str
    baseline: str
    engine: str
    gone: str


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#5c6670", "#e3e7eb", "#8a939c", "#0072b2", "#b9c0c7")
DARK = Theme("dark", "#171b20", "#e8ebee", "#9aa4ae", "#2c333b", "#8a939c", "#56b4e9", "#59626b")


def _settings(theme: Theme) -> Mapping[str, Any]:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.background,
        "axes.grid": False,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 9,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": theme.background,
        "font.family": _FONT,
        "font.size": 9,
        "grid.color": theme.line,
        "grid.linewidth": 0.8,
        "savefig.facecolor": theme.background,
        "svg.fonttype": "none",  # text stays text: sharp, small, and in the reader's own font
        "svg.hashsalt": "tokcc",  # the same report gives the same file
        "text.color": theme.text,
        "xtick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "xtick.labelsize": 9,
        "ytick.color": theme.line,
        "ytick.labelcolor": theme.muted,
        "ytick.labelsize": 9,
        "ytick.left": False,
    }


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Use a theme while drawing; the caller's matplotlib settings are back afterwards."""
    import matplotlib as mpl

    settings: Any = mpl.rcParams
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's own style must not change a report
        settings.update(_settings(theme))
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; pyplot and its global registry are not involved."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure) -> bytes:
    """Render a chart as SVG, to be shown in the font of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(stream, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]  # without the document type, which names an address
    return svg.replace(f"'{_FONT}'", _PAGE_FONT).encode()


def to_png(figure: Figure, *, dpi: int = 144) -> bytes:
    """Render a picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = BytesIO()
    figure.set_dpi(dpi)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(stream, metadata={"Software": "tokcc"})
    return stream.getvalue()
