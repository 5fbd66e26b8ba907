"""Calibration data from pictures: a file, a folder, or a folder of class folders."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokcc.errors import UsageError
from tokcc.report.batches import DEFAULT_BATCH, Sample
from tokcc.report.processor import ImagePlan

__all__ = ["IMAGE_SUFFIXES", "ImageFiles", "find_images", "image_samples"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageFiles:
    """The pictures of a folder.

    Attributes:
        paths: The files, in order of their names.
        labels: Class of each, or None.
        notes: How labels were made, or why not.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    notes: tuple[str, ...] = ()


def find_images(source: Path, *, limit: int | None, seed: int, label_names: Sequence[str] = ()) -> ImageFiles:
    """Find the pictures under a folder; sub-folders are classes.

    Args:
        source: A folder, or one picture.
        limit: Use at most so many, drawn with ``seed`` over all classes.
        seed: Seed of the draw.
        label_names: The model's class names, to find the class of a sub-folder by name.

    Raises:
        UsageError: There is no picture.
    """
    if source.is_file():
        return ImageFiles((source,), None)
    files = [path for path in sorted(source.rglob("*")) if _is_image(path.relative_to(source)) and path.is_file()]
    if not files:
        raise UsageError(
            f"no images in {source}",
            needed=", ".join(sorted(IMAGE_SUFFIXES)),
            found=_what_is_there(source),
            help="give a folder of images, or of one sub-folder per class",
        )
    notes: list[str] = []
    if limit is not None and len(files) > limit:
        notes.append(f"images: {limit} of {len(files)} used, drawn with seed {seed}")
        files = sorted(random.Random(seed).sample(files, limit))
    classes = {path.relative_to(source).parts[0] for path in files if len(path.relative_to(source).parts) > 1}
    if not classes:
        return ImageFiles(tuple(files), None, tuple(notes))
    all_classes = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if any(path.parent == source for path in files):
        notes.append("images: no labels, because some images lie beside the class folders")
        return ImageFiles(tuple(files), None, tuple(notes))
    numbers, note = _class_numbers(all_classes, label_names)
    notes.append(note)
    if numbers is None:
        return ImageFiles(tuple(files), None, tuple(notes))
    labels = tuple(numbers[path.relative_to(source).parts[0]] for path in files)
    return ImageFiles(tuple(files), labels, tuple(notes))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _what_is_there(folder: Path) -> str:
    names = [path.name for path in sorted(folder.iterdir())[:4]]
    return ", ".join(names) + (", ..." if len(names) == 4 else "") if names else "an empty folder"


def _class_numbers(classes: Sequence[str], label_names: Sequence[str]) -> tuple[dict[str, int] | None, str]:
    """Map class folders to class indices: by the model's names, by number, or by order where the count fits."""
    known = {_plain(name): index for index, name in enumerate(label_names)}
    if known and all(_plain(name) in known for name in classes):
        return {
            name: known[_plain(name)] for name in classes
        }, "labels: class folders matched with the model's class names"
    if all(name.isdecimal() for name in classes):
        return {name: int(name) for name in classes}, "labels: class folders are class numbers"
    if not label_names or len(label_names) == len(classes):
        order = {name: index for index, name in enumerate(classes)}
        return order, "labels: class folders in alphabetical order are taken as classes 0, 1, 2, ..."
    unknown = next(name for name in classes if _plain(name) not in known)
    return None, (
        f"images: no labels, because class folder {unknown!r} is none of the model's {len(label_names)} classes; "
        "name the folders after the classes or their numbers"
    )


def _plain(name: str) -> str:
    return name.split(",")[0].strip().lower().replace("_", " ").replace("-", " ")


def image_samples(files: ImageFiles, plan: ImagePlan, *, group: int | None) -> Iterator[list[Sample]]:
    """Read pictures in groups; each sample keeps its pixels for the report."""
    size = group or DEFAULT_BATCH
    for start in range(0, len(files.paths), size):
        samples = []
        for position, path in enumerate(files.paths[start : start + size], start):
            pixels = plan.pixels(path)
            label = None if files.labels is None else files.labels[position]
            samples.append(Sample({plan.spec.name: plan.normalised(pixels)}, label=label, image=pixels))
        yield samples
