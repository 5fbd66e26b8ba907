"""``report.html``: one self-contained page that a person can act on.

The page holds everything inline: style, pictures as data URIs, no script, no address. Its content security policy
forbids it to load anything, so it can be mailed or archived as it is.
"""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

from tokcc.errors import OutputError
from tokcc.report.extras import require
from tokcc.report.page import page_content
from tokcc.report.schema import Figure, Report

__all__ = ["render_html", "write_html"]

_TYPES = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg"}


def write_html(report: Report, folder: str | Path, *, bundle: str | None = None) -> Path:
    """Write ``report.html`` into a bundle, with the pictures that lie there.

    Args:
        report: The report.
        folder: The bundle; figures are read from it.
        bundle: How the user calls the bundle, for commands; by default the folder's name.

    Raises:
        UsageError: jinja2 is not installed.
        OutputError: The file cannot be written.
    """
    target = Path(folder) / "report.html"
    page = render_html(report, folder, bundle=bundle)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {target.name}", found=str(error)) from error
    return target


def render_html(report: Report, folder: str | Path | None = None, *, bundle: str | None = None) -> str:
    """Return the page.

    Args:
        report: The report.
        folder: Where its figures are; without it the page has none.
        bundle: How the user calls the bundle, for commands.

    Raises:
        UsageError: jinja2 is not installed.
    """
    require("jinja2", "the HTML report")
    import jinja2

    templates = resources.files("tokcc.report") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    template = environment.from_string((templates / "report.html.j2").read_text(encoding="utf-8"))
    style = (templates / "report.css").read_text(encoding="utf-8")
    name = bundle or (Path(folder).name if folder is not None else "BUNDLE")
    return template.render(style=_markup(style), figures=_figures(report, folder), **page_content(report, name)) + "\n"


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # our own style sheet, not data


def _figures(report: Report, folder: str | Path | None) -> list[dict[str, Any]]:
    shown = [figure for figure in report.figures if figure.name != "kept_text"]  # the page has the words themselves
    found = [picture for figure in shown if (picture := _figure(figure, folder)) is not None]
    narrow = [picture for picture in found if not picture["wide"]]
    if len(narrow) % 2:  # two stand side by side; the odd one gets a line of its own, not a hole beside it
        narrow[-1]["lone"] = True
    return found


def _figure(figure: Figure, folder: str | Path | None) -> dict[str, Any] | None:
    light = _data_uri(figure.path, folder)
    if light is None:
        return None
    return {
        "title": figure.title,
        "caption": figure.caption,
        "alt": figure.alt or figure.title,
        "wide": figure.wide,
        "lone": False,
        "light": light,
        "dark": None if figure.dark_path is None else _data_uri(figure.dark_path, folder),
    }


def _data_uri(name: str, folder: str | Path | None) -> str | None:
    """Return a picture of the bundle as a data URI; None for what is missing, of another type, or outside of it."""
    if folder is None:
        return None
    root = Path(folder).resolve()
    path = (root / name).resolve()
    kind = _TYPES.get(path.suffix.lower())
    if kind is None or not path.is_relative_to(root) or not path.is_file():
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
