from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokcc.errors import UsageError
from tokcc.report.batches import InputSpec
from tokcc.report.data import load_calibration
from tokcc.report.processor import plan_images

IMAGE = InputSpec("pixel_values", "float32", ("batch", 3, 32, 32))
MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.26, 0.27]


def picture(path: Path, height: int = 48, width: int = 40, *, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).convert(mode).save(path)
    return path


def processor(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}, "resample": 2},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    "BitImageProcessor": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    "DeiTImageProcessor": {
        "size": {"height": 37, "width": 37},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    },
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(48, 40), (37, 61), (20, 33), (32, 32)])
def test_pixels_are_those_of_transformers(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"image_processor_type": kind, "image_mean": MEAN, "image_std": STD, **CONFIGS[kind]}
    folder = processor(tmp_path / "model", **config)
    path = picture(tmp_path / "a.png", *size)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)
    with Image.open(path) as image:
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
    plan, notes = plan_images([IMAGE], folder)
    ours = plan.normalised(plan.pixels(path))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    assert notes == []


def test_without_a_processor_the_imagenet_way_is_taken_and_said(tmp_path: Path) -> None:
    path = picture(tmp_path / "images" / "a.png", 50, 70)
    data = load_calibration(path.parent, [IMAGE])
    with Image.open(path) as image:
        resized = image.resize((37 * 70 // 50, 37), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(data.feeds[0]["pixel_values"][0], expected.transpose(2, 0, 1), atol=1e-5)
    assert data.images[0].shape == (32, 32, 3)
    assert data.images[0].dtype == np.uint8
    assert "ImageNet mean and std" in data.notes[0]
    assert data.labels is None


def test_grey_alpha_palette_and_rotated_pictures(tmp_path: Path) -> None:
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg")):
        picture(tmp_path / "images" / f"{mode}.{suffix}", mode=mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    with Image.open(picture(tmp_path / "wide.png", 40, 80)) as image:
        image.save(tmp_path / "images" / "turned.jpg", exif=exif)
    data = load_calibration(tmp_path / "images", [IMAGE])
    assert data.samples == 5
    assert all(image.shape == (32, 32, 3) for image in data.images)


def test_channels_last_grey_and_raw_pixel_inputs(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    last = load_calibration(tmp_path / "images", [InputSpec("x", "float32", (1, 32, 32, 3))])
    first = load_calibration(tmp_path / "images", [InputSpec("x", "float32", (1, 3, 32, 32))])
    np.testing.assert_array_equal(last.feeds[0]["x"].transpose(0, 3, 1, 2), first.feeds[0]["x"])
    grey = load_calibration(tmp_path / "images", [InputSpec("x", "float32", (1, 1, 28, 28))])
    assert grey.feeds[0]["x"].shape == (1, 1, 28, 28)
    raw = load_calibration(tmp_path / "images", [InputSpec("x", "uint8", (1, 3, 32, 32))])
    np.testing.assert_array_equal(raw.feeds[0]["x"][0].transpose(1, 2, 0), raw.images[0])
    half = load_calibration(tmp_path / "images", [InputSpec("x", "float16", (1, 3, 32, 32))])
    assert half.feeds[0]["x"].dtype == np.float16


def test_another_size_than_the_processors_is_scaled_and_said(tmp_path: Path) -> None:
    folder = processor(tmp_path / "m", size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}, resample=3)
    plan, notes = plan_images([InputSpec("x", "float32", ("b", 3, 64, 64))], folder)
    assert (plan.size, plan.resize) == ((64, 64), 74)
    assert "the processor makes 32x32, the model takes 64x64" in notes[0]


def test_dynamic_sizes_follow_the_processor(tmp_path: Path) -> None:
    spec = InputSpec("x", "float32", ("b", 3, "h", "w"))
    folder = processor(tmp_path / "m", size={"height": 48, "width": 40}, resample=3, do_normalize=False)
    plan, notes = plan_images([spec], folder)
    assert (plan.size, notes) == ((48, 40), [])
    picture(tmp_path / "images" / "a.png", 48, 40)
    data = load_calibration(tmp_path / "images", [spec], preprocessor=folder)
    np.testing.assert_allclose(data.feeds[0]["x"][0].transpose(1, 2, 0), data.images[0] / 255, atol=1e-6)
    assert plan_images([spec], None)[0].size == (224, 224)


def test_nested_processor_file(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"size": {"height": 32, "width": 32}, "image_mean": [0.5], "image_std": 0.25}})
    )
    plan, _ = plan_images([IMAGE], tmp_path)
    assert (plan.mean, plan.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_damaged_processor_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match="preprocessor_config"):
        plan_images([IMAGE], tmp_path)


@pytest.mark.parametrize(
    ("folders", "names", "labels"),
    [
        (("cat", "dog"), ("dog", "cat"), [1, 1, 0, 0]),
        (("cat", "dog"), (), [0, 0, 1, 1]),
        (("cat", "dog"), ("a", "b"), [0, 0, 1, 1]),
        (("3", "7"), tuple("abcdefgh"), [3, 3, 7, 7]),
        (("cat", "dog"), ("a", "b", "c"), None),
        (("golden_retriever", "tabby"), ("tabby, tabby cat", "golden retriever"), [1, 1, 0, 0]),
    ],
)
def test_sub_folders_are_classes(
    tmp_path: Path, folders: tuple[str, ...], names: tuple[str, ...], labels: list[int] | None
) -> None:
    for position, name in enumerate(folders):
        for number in range(2):
            picture(tmp_path / name / f"{number}.jpg", seed=position * 2 + number)
    (tmp_path / "README.txt").write_text("not an image")
    (tmp_path / folders[0] / ".hidden.png").write_text("not an image")
    data = load_calibration(tmp_path, [IMAGE], label_names=names)
    assert data.labels == labels
    assert any("labels" in note for note in data.notes)


def test_images_beside_class_folders_mean_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "cat" / "b.png")
    data = load_calibration(tmp_path, [IMAGE])
    assert data.samples == 2
    assert data.labels is None
    assert any("beside the class folders" in note for note in data.notes)


def test_a_limit_draws_with_a_seed_over_all_classes(tmp_path: Path) -> None:
    for position in range(12):
        picture(tmp_path / f"{position % 3}" / f"{position}.png", 32, 32, seed=position)
    first = load_calibration(tmp_path, [IMAGE], limit=6, seed=1)
    again = load_calibration(tmp_path, [IMAGE], limit=6, seed=1)
    other = load_calibration(tmp_path, [IMAGE], limit=6, seed=2)
    assert first.samples == 6
    assert len(set(first.labels or [])) > 1
    assert all(np.array_equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first.images, other.images, strict=True))
    assert any("6 of 12 used" in note for note in first.notes)


def test_batches_of_a_fixed_size_drop_the_rest(tmp_path: Path) -> None:
    for position in range(7):
        picture(tmp_path / f"{position}.png", seed=position)
    fixed = load_calibration(tmp_path, [InputSpec("x", "float32", (3, 3, 32, 32))])
    assert [len(feed["x"]) for feed in fixed.feeds] == [3, 3]
    assert len(fixed.images) == fixed.samples == 6
    assert any("1 samples left out" in note for note in fixed.notes)
    free = load_calibration(tmp_path, [IMAGE], batch_size=4)
    assert [len(feed["pixel_values"]) for feed in free.feeds] == [4, 3]


def test_refusals_name_the_problem_and_the_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no images in"):
        load_calibration(empty, [IMAGE])
    broken = tmp_path / "broken" / "photo.png"
    picture(broken)
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UsageError, match=r"cannot read the image .*photo\.png"):
        load_calibration(broken.parent, [IMAGE])
    broken.write_text("hello")
    with pytest.raises(UsageError, match=r"photo\.png"):
        load_calibration(broken, [IMAGE])
    with pytest.raises(UsageError, match="the model takes no images"):
        load_calibration(picture(tmp_path / "a.png"), [InputSpec("input_ids", "int64", (1, 8))])
    with pytest.raises(UsageError, match="the model has more"):
        load_calibration(tmp_path / "a.png", [IMAGE, InputSpec("input_ids", "int64", (1, 8))])
    with pytest.raises(UsageError, match="not enough calibration data"):
        load_calibration(tmp_path / "a.png", [InputSpec("x", "float32", (8, 3, 32, 32))])
    with pytest.raises(UsageError, match="does not exist"):
        load_calibration(tmp_path / "nowhere", [IMAGE])
