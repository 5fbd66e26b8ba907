"""The page of a gallery: its grid, its words, and what goes into it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokcc.errors import PlanError, UsageError
from tokcc.report import extras
from tokcc.report.gallery import Gallery, Picture, Refusal, check_gallery_path
from tokcc.report.kept import KeptTokens, patch_grid


def dropped(*gone: int, layer: int = 0) -> KeptTokens:
    kept = np.ones((1, 9), dtype=bool)
    kept[0, [1 + patch for patch in gone]] = False
    return KeptTokens(layer=layer, step="prune", kept=kept, prefix=1, grid=(2, 4))


def merged() -> KeptTokens:
    assign = np.array([[0, 1, 1, 2, 3, 4, 5, 6, 7]])
    return KeptTokens(layer=2, step="merge", kept=None, assign=assign, prefix=1, grid=(2, 4))


def sample(*pictures: Picture, channels: int = 3) -> Gallery:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, channels), dtype=np.uint8)
    refusals = tuple(Refusal.of(name, PlanError("no <text> here")) for name in ("one", "two"))
    return Gallery("model.pt", "<photo>.jpg", pixels, pictures, (*refusals, Refusal("three", "else", {})))


@pytest.mark.parametrize(
    ("patches", "height", "width", "grid"),
    [
        (256, 224, 224, (16, 16)),
        (32, 56, 112, (4, 8)),
        (32, 112, 56, (8, 4)),
        (6, 20, 30, (2, 3)),
        (255, 224, 224, None),  # no square
        (30, 28, 28, None),  # 5 x 6 patches would not be square
        (0, 224, 224, None),
        (1, 14, 14, (1, 1)),
    ],
)
def test_grids_of_square_patches(patches: int, height: int, width: int, grid: tuple[int, int] | None) -> None:
    assert patch_grid(patches, height, width) == grid


def test_counts_and_words() -> None:
    every = Picture("a", "A", (dropped(0), dropped(0, 5, layer=3)))
    assert (every.kept, every.total, every.where) == (6, 8, "blocks 0, 3")
    assert Picture("b", "B", (merged(),)).kept == 7
    assert Picture("b", "B", (merged(),)).where == "block 2"
    assert Picture("c", "C", tuple(dropped(layer=n) for n in range(6))).where == "6 blocks, 0 to 5"


def test_reasons_are_said_once() -> None:
    assert sample().refused() == [("no <text> here", ("one", "two")), ("else", ("three",))]


def test_the_caption_explains_what_is_there() -> None:
    assert "Dark" not in sample(Picture("b", "B", (merged(),))).caption
    assert "outline" not in sample(Picture("a", "A", (dropped(1),))).caption


def test_the_page_escapes_names() -> None:
    page = sample(Picture("a", "<A>", (dropped(1),))).html()
    assert "&lt;photo&gt;.jpg" in page
    assert "&lt;A&gt;" in page
    assert "no &lt;text&gt; here" in page
    assert "<photo>" not in page


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 6, 16])
def test_any_number_of_tiles_fits_on_the_picture(count: int, channels: int) -> None:
    pictures = [Picture(f"method-{number}", "M", (dropped(number % 8),)) for number in range(count)]
    with Image.open(BytesIO(sample(*pictures, channels=channels).png())) as made:
        pixels = np.asarray(made.convert("RGB"))
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == 255).all()  # nothing is cut off
    assert made.mode == "P"


@pytest.mark.parametrize("name", ["page.pdf", "page", ".html"])
def test_other_files_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.html or \.png"):
        check_gallery_path(Path(name))


def test_what_draws_it_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "available", lambda *modules: modules != ("jinja2",))
    check_gallery_path(Path("page.png"))
    with pytest.raises(UsageError, match="tokcc\\[report\\]"):
        check_gallery_path(Path("page.html"))
