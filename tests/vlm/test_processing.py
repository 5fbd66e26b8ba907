"""From what processors give to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.vlm import processors
from tests.vlm.families import IMAGE
from tokcc.backends.manifest import Media
from tokcc.backends.processing import Processor, pictures_of
from tokcc.errors import UsageError


def media(**settings: Any) -> Media:
    common = {"task": "image-text-to-text", "family": "any", "part": "vision_encoder", "input": "pixel_values"}
    numbers = {"output": "image_features", "token_id": IMAGE, "unit": "tile", "stock_tokens": 4, "tokens": 4}
    return Media(**{**common, **numbers, **settings})


def test_images_side_by_side() -> None:
    pixels = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
    made = list(pictures_of({"pixel_values": pixels}, media()))
    assert [picture.units.shape for picture in made] == [(1, 3, 4, 4)] * 2
    np.testing.assert_array_equal(np.concatenate([picture.units for picture in made]), pixels)


def test_empty_tiles_are_left_out() -> None:
    pixels = np.ones((1, 3, 3, 4, 4), np.float32)
    pixels[0, 2] = 0
    assert len(list(pictures_of({"pixel_values": pixels}, media()))) == 2


def test_tiles_of_an_image_stay_together() -> None:
    """The second image has fewer tiles; a batch is filled up."""
    pixels = np.ones((2, 5, 3, 4, 4), np.float32)
    arrays = {"pixel_values": pixels, "image_sizes": np.array([[8, 8], [4, 8]])}
    known = media(packing="anyres", pinpoints=((8, 8), (4, 8)))
    made = list(pictures_of(arrays, known, 4))
    assert [(len(picture.units), picture.size) for picture in made] == [(5, (8, 8)), (3, (4, 8))]


def test_patches_of_each_image() -> None:
    arrays = {"pixel_values": np.ones((28, 6)), "image_grid_thw": np.array([[1, 4, 4], [1, 2, 6]])}
    assert [len(picture.units) for picture in pictures_of(arrays, media())] == [16, 12]


def test_masks_of_sounds() -> None:
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    arrays = {"input_features": np.ones((2, 8, 3)), "feature_attention_mask": mask}
    made = list(pictures_of(arrays, media(input="input_features")))
    assert [picture.beside["feature_attention_mask"].tolist() for picture in made] == [[[1, 1, 0]], [[1, 1, 1]]]


def test_a_stock_processor(tmp_path: Path) -> None:
    processors.idefics3().save_pretrained(tmp_path)
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "a.png")
    ids, pictures = Processor(tmp_path, media()).read("w3 <image> w4", [tmp_path / "a.png"])
    assert (ids[0], ids[-1], ids.count(IMAGE)) == (3, 4, 5 * 4)
    assert [picture.units.shape for picture in pictures] == [(1, 3, 32, 32)] * 5
    ids, pictures = Processor(tmp_path, media()).read("w3 w4", [])
    assert (ids, pictures) == ([3, 4], [])


def test_an_engine_for_one_shape_gets_that_shape(tmp_path: Path) -> None:
    processors.llava().save_pretrained(tmp_path)
    Image.new("RGB", (40, 70), (10, 200, 30)).save(tmp_path / "a.png")
    opened = Processor(tmp_path, media(pixels=(24, 16)))._open(tmp_path / "a.png")
    assert opened.size == (16, 24)


def test_a_bundle_without_a_processor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no processor"):
        Processor(tmp_path, media())
