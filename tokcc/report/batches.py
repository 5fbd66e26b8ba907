"""From samples to feeds: what the engine's inputs look like, batching, and checks with words a user understands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.distances import Array

__all__ = [
    "DEFAULT_BATCH",
    "Batches",
    "InputSpec",
    "Sample",
    "assemble",
    "batched_names",
    "cast",
    "chosen_batch",
    "required",
]

DEFAULT_BATCH = 8
"""Batch size for an engine with a dynamic batch axis, when the user does not choose one."""

Feed = dict[str, Array]


@dataclass(frozen=True)
class InputSpec:
    """One input of the engine.

    Attributes:
        name: Its name.
        dtype: Numpy name of its element type.
        shape: Its dimensions; a string is a dynamic axis.
        unguided: What stands for data that has nothing for it, where the policy added the input; None = data must.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    unguided: float | None = None

    def __str__(self) -> str:
        return f"{self.name}={self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Sample:
    """One sample: the inputs without their batch axis, and what a report wants to show of it."""

    inputs: Mapping[str, Array]
    label: int | None = None
    image: Array | None = None
    tokens: list[str] | None = None


@dataclass
class Batches:
    """What :func:`assemble` made: feeds, how many samples each holds, and these samples in order."""

    feeds: list[Feed] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    dropped: int = 0


def required(specs: Sequence[InputSpec]) -> list[InputSpec]:
    """Return the inputs that data must have: the model's own, without those that a policy added."""
    return [spec for spec in specs if spec.unguided is None]


def batched_names(specs: Sequence[InputSpec]) -> frozenset[str]:
    """Names of the inputs whose first axis is the batch; the others are the same for every sample."""
    first = next((spec.shape[0] for spec in specs if spec.shape), None)
    return frozenset(
        spec.name for spec in specs if spec.shape and (isinstance(spec.shape[0], str) or spec.shape[0] == first)
    )


def chosen_batch(specs: Sequence[InputSpec], wanted: int | None) -> tuple[int | None, bool]:
    """Return the batch size (None = free to choose) and whether the engine fixes it.

    Raises:
        UsageError: The wished size is not the engine's.
    """
    if wanted is not None and wanted < 1:
        raise UsageError("the batch size is too small", needed="at least 1", found=str(wanted))
    fixed = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)), None)
    dynamic = any(spec.shape and isinstance(spec.shape[0], str) for spec in specs)
    if dynamic or not isinstance(fixed, int):
        return wanted, False
    if wanted is not None and wanted != fixed:
        raise UsageError(
            "the engine has a fixed batch size",
            needed=str(fixed),
            found=str(wanted),
            help="leave the batch size out, or compile with a dynamic batch axis (--dynamic NAME:0=1..64)",
        )
    return fixed, True


def assemble(
    groups: Iterable[Sequence[Sample]], specs: Sequence[InputSpec], *, size: int | None, fixed: bool, source: str
) -> Batches:
    """Stack samples into feeds.

    Args:
        groups: Samples in the groups that they came in.
        specs: The engine's inputs.
        size: Samples per feed; None keeps the groups.
        fixed: Whether a feed must have exactly ``size`` samples; a rest is then dropped (and counted).
        source: For messages.

    Raises:
        UsageError: There is no sample, not enough for one batch, or one does not fit the inputs.
    """
    made = Batches()
    batched = batched_names(specs)
    for batch in _regroup(groups, size):
        if fixed and size is not None and len(batch) < size:
            made.dropped += len(batch)
            continue
        made.feeds.append(_stack(batch, specs, batched, source))
        made.sizes.append(len(batch))
        made.samples.extend(batch)
    if made.feeds:
        return made
    if made.dropped:
        raise UsageError(
            "not enough calibration data for one batch",
            needed=f"{size} samples of one shape",
            found=f"{made.dropped} in {source}",
            help="give more data, or compile with a smaller or dynamic batch axis",
        )
    raise UsageError("the calibration data is empty", found=source, help="give at least one sample")


def _regroup(groups: Iterable[Sequence[Sample]], size: int | None) -> Iterator[list[Sample]]:
    """Yield lists of ``size`` samples of one shape; a change of shape ends a list early."""
    waiting: list[Sample] = []
    for group in groups:
        for sample in group:
            if waiting and (len(waiting) == size or _shapes(sample) != _shapes(waiting[0])):
                yield waiting
                waiting = []
            waiting.append(sample)
        if size is None and waiting:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in sample.inputs.items()}


def _stack(batch: Sequence[Sample], specs: Sequence[InputSpec], batched: frozenset[str], source: str) -> Feed:
    feed: Feed = {}
    sizes: dict[str, int] = {}
    for spec in specs:
        if spec.name not in batch[0].inputs and spec.unguided is not None:
            shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape]
            feed[spec.name] = np.full([len(batch), *shape[1:]], spec.unguided, dtype=_dtype(spec))
            continue
        if spec.name not in batch[0].inputs:
            raise UsageError(
                f"calibration data has nothing for input {spec.name}",
                needed=", ".join(map(str, specs)),
                found=", ".join(batch[0].inputs) or "nothing",
                help="an .npz holds every input by name",
            )
        values = [np.asarray(sample.inputs[spec.name]) for sample in batch]
        array = np.stack(values) if spec.name in batched else values[0]
        feed[spec.name] = cast(_fitting(array, spec, sizes, source), spec)
    return feed


def _fitting(array: Array, spec: InputSpec, sizes: dict[str, int], source: str) -> Array:
    """Check a shape against the specification; one name of a dynamic axis means one size within a feed."""
    fits = array.ndim == len(spec.shape)
    for found, needed in zip(array.shape, spec.shape, strict=False):
        if isinstance(needed, int):
            fits = fits and found == needed
        elif needed.isidentifier():
            fits = fits and sizes.setdefault(needed, found) == found
    if fits:
        return array
    raise UsageError(
        f"calibration data has the wrong shape for input {spec.name}",
        needed=f"[{', '.join(map(str, spec.shape))}]",
        found=f"[{', '.join(map(str, array.shape))}] from {source}",
        help="the first axis is the batch; the others must be the model's, or a dynamic axis it was compiled with",
    )


def cast(array: Array, spec: InputSpec) -> Array:
    """Convert to the input's type where no value changes its meaning.

    Raises:
        UsageError: The types have nothing to do with each other, a value does not fit, or is NaN or infinite.
    """
    target = _dtype(spec)
    kind = array.dtype.kind
    if kind not in "fiub" or (kind == "f" and target.kind in "iu") or (target.kind == "b" and kind != "b"):
        raise UsageError(
            f"calibration data has the wrong type for input {spec.name}", needed=spec.dtype, found=str(array.dtype)
        )
    if kind == "f" and not np.isfinite(array).all():
        raise UsageError(
            f"calibration data for input {spec.name} contains NaN or infinity",
            help="remove these samples from the data",
        )
    if kind in "iu" and target.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        limits = np.iinfo(target.name)
        if low < limits.min or high > limits.max:
            raise UsageError(
                f"calibration data for input {spec.name} does not fit its type",
                needed=spec.dtype,
                found=f"{low}..{high}",
            )
    return np.asarray(array, dtype=target, order="C")  # ascontiguousarray would add an axis to a scalar


def _dtype(spec: InputSpec) -> np.dtype[np.generic]:
    try:
        return np.dtype(spec.dtype)
    except TypeError as error:
        raise UsageError(
            f"calibration data cannot be made for input {spec.name}",
            needed="a type that numpy has",
            found=spec.dtype,
            help="compile with --dtype float32 or float16, or --no-calibrate",
        ) from error
