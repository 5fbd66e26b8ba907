"""Calibration data: whatever a user has, as feeds of the engine.

A folder of pictures (sub-folders are classes), ``.npz``, ``.npy``, ``.jsonl`` or ``.txt`` text, or a Python iterable
such as a DataLoader. Everything that was assumed on the way is a note for the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokcc.errors import UsageError
from tokcc.report.arrays import iterate, read_numpy, samples_of
from tokcc.report.batches import DEFAULT_BATCH, Batches, InputSpec, Sample, assemble, chosen_batch, required
from tokcc.report.distances import Array
from tokcc.report.images import IMAGE_SUFFIXES, find_images, image_samples
from tokcc.report.processor import plan_images
from tokcc.report.texts import read_lines, text_samples

__all__ = ["CalibrationData", "InputSpec", "load_calibration"]

DEFAULT_LIMIT = 512
"""Samples that are used unless the user asks for more: they are held in memory."""


@dataclass(frozen=True)
class CalibrationData:
    """Feeds for the engine, and what a report shows of them.

    Attributes:
        feeds: One mapping of input name to array per batch.
        images: Pixels of every sample as the model sees them, uint8 ``[H, W, C]``; empty without pictures.
        texts: Tokens of every sample; empty without text.
        labels: Class of every sample, or None.
        source: What it was made from, for the report.
        notes: What was assumed or left out.
        sizes: Samples in each feed.
    """

    feeds: list[dict[str, Array]]
    images: list[Array] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    labels: list[int] | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def batches(self) -> Iterator[tuple[dict[str, Array], list[int] | None]]:
        """Yield each feed with the labels of its samples."""
        position = 0
        for feed, count in zip(self.feeds, self.sizes, strict=True):
            yield feed, None if self.labels is None else self.labels[position : position + count]
            position += count

    @property
    def samples(self) -> int:
        """Number of samples in all feeds."""
        return sum(self.sizes)


def load_calibration(
    data: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocessor: Path | None = None,
    batch_size: int | None = None,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    label_names: Sequence[str] = (),
    task: str | None = None,
) -> CalibrationData:
    """Read calibration data of any form.

    Args:
        data: A path (folder of images, ``.npz``, ``.npy``, ``.jsonl``, ``.txt``, one image), a mapping of arrays by
            input name, an iterable of batches or samples, or a ``CalibrationData``, which is returned as it is.
        inputs: What the engine expects.
        preprocessor: Folder with the processor's or tokenizer's files, if any.
        batch_size: Samples per feed; None = the engine's own, or 8 (batches of an iterable stay as they are).
        limit: Use at most so many samples; None = all.
        seed: Seed of the draw when there are more.
        label_names: The model's class names.
        task: The model's task; for text generation a ``.txt`` is one long text.

    Raises:
        UsageError: The data is missing, empty, damaged, or does not fit the inputs.
    """
    if isinstance(data, CalibrationData):
        return data
    if not inputs:
        raise UsageError("the model has no inputs to calibrate")
    if limit is not None and limit < 1:
        raise UsageError("the limit of calibration samples is too small", needed="at least 1", found=str(limit))
    size, fixed = chosen_batch(inputs, batch_size)
    notes: list[str] = []
    source = _describe(data)
    if isinstance(data, str | Path):
        path = _existing(Path(data))
        groups = _from_path(
            path, inputs, preprocessor=preprocessor, size=size, limit=limit, seed=seed, label_names=label_names,
            whole=bool(task) and "generation" in str(task), notes=notes,
        )  # fmt: skip
        size = size or DEFAULT_BATCH
    else:
        groups = _from_python(data, inputs, source)
        if isinstance(data, Mapping) or hasattr(data, "shape"):
            size = size or DEFAULT_BATCH
    made = assemble(_limited(groups, limit, notes), inputs, size=size, fixed=fixed, source=source)
    if made.dropped:
        notes.append(f"calibration: {made.dropped} samples left out, because the batch size is fixed at {size}")
    for spec in inputs:
        if spec.unguided is not None and any(spec.name not in sample.inputs for sample in made.samples):
            notes.append(
                f"calibration: the data has no `{spec.name}`: {spec.unguided:g} is fed, with which the method is not "
                "guided"
            )
    return _collect(made, source, notes)


def _collect(made: Batches, source: str, notes: Sequence[str]) -> CalibrationData:
    labels = [sample.label for sample in made.samples if sample.label is not None]
    if labels and len(labels) != len(made.samples):
        raise UsageError(
            "some calibration samples have a label and some have not",
            needed="labels for all samples, or for none",
            found=f"{len(labels)} of {len(made.samples)}",
        )
    return CalibrationData(
        feeds=made.feeds,
        images=[sample.image for sample in made.samples if sample.image is not None],
        texts=[sample.tokens for sample in made.samples if sample.tokens is not None],
        labels=labels or None,
        source=source,
        notes=tuple(notes),
        sizes=tuple(made.sizes),
    )


def _describe(data: Any) -> str:
    if isinstance(data, str | Path):
        return Path(data).name or str(data)
    return type(data).__name__


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    raise UsageError(
        f"the calibration data {path} does not exist", help="give a folder of images, .npz, .jsonl or .txt"
    )


def _from_path(
    path: Path,
    inputs: Sequence[InputSpec],
    *,
    preprocessor: Path | None,
    size: int | None,
    limit: int | None,
    seed: int,
    label_names: Sequence[str],
    whole: bool,
    notes: list[str],
) -> Iterable[Sequence[Sample]]:
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in IMAGE_SUFFIXES:
        plan, assumed = plan_images(required(inputs), preprocessor)
        files = find_images(path, limit=limit, seed=seed, label_names=label_names)
        notes.extend([*files.notes, *assumed])
        return image_samples(files, plan, group=size)
    if suffix in {".npz", ".npy"}:
        return [samples_of(read_numpy(path, inputs), inputs, path.name)]
    if suffix in {".jsonl", ".txt"}:
        whole = whole and suffix == ".txt"
        lines = read_lines(path, whole=whole, limit=limit, label_names=label_names)
        return text_samples(lines, required(inputs), preprocessor, whole=whole, group=size, limit=limit, notes=notes)
    raise UsageError(
        f"calibration data of this kind is not known: {path.name}",
        needed="a folder of images, .npz, .npy, .jsonl or .txt",
        found=suffix or "a file without a suffix",
    )


def _from_python(data: Any, inputs: Sequence[InputSpec], source: str) -> Iterable[Sequence[Sample]]:
    if isinstance(data, Mapping):
        return [samples_of(data, inputs, "the calibration mapping")]
    if hasattr(data, "shape"):  # one array or tensor of all samples
        return iterate([data], inputs, "the calibration data")
    if isinstance(data, Iterable):
        return iterate(data, inputs, source)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a map-style dataset of torch
        return iterate((data[position] for position in range(len(data))), inputs, source)
    raise UsageError(
        "this is not calibration data",
        needed="a path, a mapping of arrays, or an iterable of batches",
        found=type(data).__name__,
    )


def _limited(groups: Iterable[Sequence[Sample]], limit: int | None, notes: list[str]) -> Iterator[Sequence[Sample]]:
    """Stop after ``limit`` samples: an iterable may be endless."""
    left = limit
    for group in groups:
        if left is None:
            yield group
            continue
        if len(group) > left:
            notes.append(f"calibration: only the first {limit} samples used")
        yield group[:left]
        left -= len(group)
        if left <= 0:
            return
