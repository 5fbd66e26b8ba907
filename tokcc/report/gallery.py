"""One page that shows what each method keeps of a photo: as HTML or as one picture."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from tokcc.backends.atomic import replace_file
from tokcc.errors import TokccError, UsageError
from tokcc.report.distances import Array
from tokcc.report.extras import require
from tokcc.report.figures import show_pixels
from tokcc.report.kept import KeptTokens, paint, painting
from tokcc.report.style import LIGHT, new_figure, styled, to_png

__all__ = ["Gallery", "Picture", "Refusal", "check_gallery_path"]

_NAMED = 4
"""At most so many blocks are named one by one."""
_NEEDS = {".html": ("PIL", "jinja2"), ".png": ("PIL", "matplotlib")}


def check_gallery_path(path: Path) -> None:
    """Check, before anything long is done, that a gallery can be written there.

    Raises:
        UsageError: Neither a page nor a picture, a folder, or what draws it is not installed.
    """
    needed = _NEEDS.get(path.suffix.lower())
    if needed is None:
        raise UsageError(
            f"a gallery is no `{path.suffix or path.name}` file", needed=" or ".join(_NEEDS), help="-o gallery.html"
        )
    if path.is_dir():
        raise UsageError(f"the output `{path}` is a folder", needed="a file", help="choose another name")
    for module in needed:
        require(module, "the gallery")


@dataclass(frozen=True)
class Picture:
    """What one policy keeps.

    Attributes:
        name: Of the preset or policy.
        title: The method, for people.
        stages: What became of the tokens, reduction by reduction; at least one.
    """

    name: str
    title: str
    stages: tuple[KeptTokens, ...]

    @property
    def last(self) -> KeptTokens:
        """After the last reduction."""
        return self.stages[-1]

    @property
    def kept(self) -> int:
        """Patches that are left, a merged group counted once."""
        return self.last.count()

    @property
    def total(self) -> int:
        """Patches of the photo."""
        rows, columns = self.last.grid or (0, 0)
        return rows * columns

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that reduce."""
        return tuple(dict.fromkeys(stage.layer for stage in self.stages))

    @property
    def where(self) -> str:
        """The same in words."""
        count = len(self.layers)
        if count == 1:
            return f"block {self.layers[0]}"
        if count > _NAMED:
            return f"{count} blocks, {self.layers[0]} to {self.layers[-1]}"
        return f"blocks {', '.join(map(str, self.layers))}"


@dataclass(frozen=True)
class Refusal:
    """A policy that does not fit the model.

    Attributes:
        name: Of the preset or policy.
        why: One line.
        details: What was needed, what was found, what helps.
    """

    name: str
    why: str
    details: Mapping[str, str]

    @staticmethod
    def of(name: str, error: TokccError) -> Refusal:
        """Return what an error says."""
        return Refusal(name, error.what, error.details())


@dataclass(frozen=True)
class Gallery:
    """A photo and what each policy keeps of it on a model.

    Attributes:
        model: How it was named.
        image: File name of the photo.
        pixels: The photo as the model sees it, uint8 ``[H, W, C]``.
        pictures: The policies that fit.
        refusals: The ones that do not.
        notes: What was assumed about the photo.
    """

    model: str
    image: str
    pixels: Array
    pictures: tuple[Picture, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain data."""
        return {
            "model": self.model,
            "image": self.image,
            "presets": [
                {
                    "preset": picture.name,
                    "title": picture.title,
                    "kept": picture.kept,
                    "total": picture.total,
                    "reductions": [{"layer": stage.layer, "kept": stage.count()} for stage in picture.stages],
                }
                for picture in self.pictures
            ],
            "refused": [{"preset": item.name, "why": item.why, **item.details} for item in self.refusals],
            "notes": list(self.notes),
        }

    @property
    def caption(self) -> str:
        """How to read the pictures."""
        budgets = "Every method with the budget it brings, after its last reduction."
        return f"{budgets} {painting([picture.last for picture in self.pictures])}"

    def refused(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the reasons, each with the policies that it keeps out."""
        found: dict[str, list[str]] = {}
        for item in self.refusals:
            found.setdefault(item.why, []).append(item.name)
        return [(why, tuple(names)) for why, names in found.items()]

    def save(self, path: str | Path) -> None:
        """Write the page (``.html``) or the picture (``.png``), whole or not at all.

        Raises:
            UsageError: Neither of the two, or what draws it is not installed.
            OutputError: It cannot be written.
        """
        target = Path(path)
        check_gallery_path(target)
        content = self.html().encode() if target.suffix.lower() == ".html" else self.png()
        replace_file(target, content)

    def html(self) -> str:
        """Return a page that loads nothing from anywhere."""
        import jinja2
        from markupsafe import Markup

        templates = resources.files("tokcc.report") / "templates"
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string((templates / "gallery.html.j2").read_text(encoding="utf-8"))
        style = Markup((templates / "report.css").read_text(encoding="utf-8"))  # our own, not data
        tiles = [(picture, _jpeg(paint(self.pixels, picture.last, 0))) for picture in self.pictures]
        return template.render(gallery=self, style=style, photo=_jpeg(self.pixels), tiles=tiles) + "\n"

    def png(self) -> bytes:
        """Return one picture of everything, with at most 256 colours."""
        height, width = self.pixels.shape[:2]
        across, down = _rows(len(self.pictures) + 1)
        tile_width, tile_height = _TILE, _TILE * height / width
        page = across * (tile_width + _GAP) + _GAP
        lines = [*_wrapped(self.caption, page), *self._refused_lines(page)]
        tall = down * (tile_height + _TITLE + _GAP) + _GAP + len(lines) * _LINE
        with styled(LIGHT):
            figure = new_figure(page, tall)
            figure.set_layout_engine("none")
            shown = [(self.image, "the photo", self.pixels)]
            for picture in self.pictures:
                label = f"{picture.kept} of {picture.total}"
                shown.append((picture.name, label, paint(self.pixels, picture.last, 0)))
            for number, (name, label, pixels) in enumerate(shown):
                row, column = divmod(number, across)
                left = _GAP + column * (tile_width + _GAP)
                bottom = tall - (row + 1) * (tile_height + _TITLE + _GAP)
                box = (left / page, bottom / tall, tile_width / page, tile_height / tall)
                show_pixels(figure.add_axes(box), pixels)
                above = (bottom + tile_height) / tall
                figure.text(box[0], above + 0.17 / tall, name, fontsize=8, fontweight="bold", parse_math=False)
                figure.text(box[0], above + 0.045 / tall, label, fontsize=7.5, color=LIGHT.muted, parse_math=False)
            for number, line in enumerate(lines):
                y = (len(lines) - number - 0.5) * _LINE / tall
                figure.text(_GAP / page, y, line, fontsize=7, color=LIGHT.muted, parse_math=False)
            return _fewer_colours(to_png(figure, dpi=96))

    def _refused_lines(self, page: float) -> list[str]:
        if not self.refusals:
            return []
        lines = ["", "Not shown:"]
        for why, names in self.refused():
            lines += _wrapped(f"{', '.join(names)}: {why}", page)
        return lines


_TILE, _GAP, _TITLE, _LINE = 1.42, 0.1, 0.34, 0.145
"""Inches of the picture's parts."""
_LETTERS = 17.5
"""Small letters in an inch."""
_COLUMNS = (8, 7, 6)
"""How wide a page may be, in tiles."""


def _rows(tiles: int) -> tuple[int, int]:
    """Return the columns and rows of a page that leave the fewest holes."""
    across = min(tiles, min(_COLUMNS, key=lambda columns: -tiles % columns))
    return across, -(-tiles // across)


def _wrapped(text: str, inches: float) -> list[str]:
    return textwrap.wrap(text, int(inches * _LETTERS), subsequent_indent="   ")


def _jpeg(pixels: Array) -> str:
    """Return pixels as a data URI."""
    from PIL import Image

    array = np.asarray(pixels, np.uint8)
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _fewer_colours(png: bytes) -> bytes:
    """Return a picture with a palette: a third of the bytes."""
    from PIL import Image

    stream = BytesIO()
    image = Image.open(BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
