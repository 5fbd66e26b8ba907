"""Calibration data from arrays: ``.npz``, ``.npy``, mappings, and Python iterables such as a DataLoader."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.batches import DEFAULT_BATCH, InputSpec, Sample, batched_names, required
from tokcc.report.distances import Array

__all__ = ["LABEL_KEYS", "iterate", "read_numpy", "samples_of"]

LABEL_KEYS = ("labels", "label")


def read_numpy(path: Path, specs: Sequence[InputSpec]) -> dict[str, Array]:
    """Read an ``.npz`` (arrays by input name) or an ``.npy`` (the only input).

    Raises:
        UsageError: The file cannot be read, holds Python objects, or is an ``.npy`` for a model with several inputs.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return {_only_input(specs, path.name): loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"cannot read {path}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            help="write it with numpy.savez(path, INPUT_NAME=array); arrays of Python objects are not read",
        ) from error


def _only_input(specs: Sequence[InputSpec], what: str) -> str:
    specs = required(specs)
    if len(specs) == 1:
        return specs[0].name
    raise UsageError(
        f"{what} holds one array, but the model has {len(specs)} inputs",
        needed=", ".join(map(str, specs)),
        help="give an .npz with one array per input name",
    )


def samples_of(arrays: Mapping[str, Any], specs: Sequence[InputSpec], source: str) -> list[Sample]:
    """Cut arrays with a leading sample axis into samples.

    Raises:
        UsageError: A key is no input, an input is missing, or the lengths differ.
    """
    named = {str(name): _array(value) for name, value in arrays.items()}
    labels = next((named.pop(key) for key in LABEL_KEYS if key in named and not _is_input(key, specs)), None)
    _check_names(named, specs, source)
    batched = batched_names(specs)
    lengths = {name: len(value) if value.ndim else 0 for name, value in named.items() if name in batched}
    if labels is not None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UsageError(
                f"labels in {source} are not class indices",
                needed="integers, one per sample",
                found=f"{labels.dtype}[{', '.join(map(str, labels.shape))}]",
            )
        lengths["labels"] = len(labels)
    if len(set(lengths.values())) > 1:
        raise UsageError(
            f"arrays in {source} have different numbers of samples",
            needed="the same length of the first axis",
            found=", ".join(f"{name}: {length}" for name, length in lengths.items()),
        )
    count = next(iter(lengths.values()), 1)
    return [
        Sample(
            {name: value[row] if name in batched else value for name, value in named.items()},
            label=None if labels is None else int(labels[row]),
        )
        for row in range(count)
    ]


def _is_input(name: str, specs: Sequence[InputSpec]) -> bool:
    return any(spec.name == name for spec in specs)


def _check_names(named: Mapping[str, Array], specs: Sequence[InputSpec], source: str) -> None:
    names = [spec.name for spec in specs]
    for name in named:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            raise UsageError(
                f"{source} has a key that is no input of the model: {name}",
                needed=", ".join(names) + ", and optionally labels",
                help=f"did you mean {nearest[0]}?" if nearest else "rename or remove it",
            )
    missing = [spec.name for spec in required(specs) if spec.name not in named]
    if missing:
        raise UsageError(
            f"{source} has nothing for input {', '.join(missing)}",
            needed=", ".join(map(str, specs)),
            found=", ".join(named) or "nothing",
        )


def _array(value: Any) -> Array:
    """Return a numpy array from an array, a torch tensor on any device, or nested lists."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        value = value.numpy()
    return np.asarray(value)


def iterate(items: Iterable[Any], specs: Sequence[InputSpec], source: str) -> Iterator[list[Sample]]:
    """Yield the samples of each item of an iterable (a DataLoader, a list, a generator).

    An item is a batch or a single sample: an array or tensor (for a model with one input), a tuple in the order of the
    inputs (one more entry = labels), or a mapping by input name (with an optional ``labels``). Single samples are put
    together into groups of ``DEFAULT_BATCH``.
    """
    single: list[Sample] = []
    for position, item in enumerate(items):
        where = f"item {position} of {source}"
        arrays = _named(item, specs, where)
        if _is_batch(arrays, specs):
            yield samples_of(arrays, specs, where)
            continue
        single.extend(samples_of(_with_batch_axis(arrays, specs), specs, where))
        if len(single) == DEFAULT_BATCH:
            yield single
            single = []
    if single:
        yield single


def _named(item: Any, specs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    if isinstance(item, Mapping):
        return {str(name): _array(value) for name, value in item.items()}
    if isinstance(item, tuple | list) and not _is_nested_numbers(item):
        specs = required(specs)
        if len(item) not in {len(specs), len(specs) + 1}:
            raise UsageError(
                f"{where} has {len(item)} entries",
                needed=f"{len(specs)} ({', '.join(spec.name for spec in specs)}), and optionally the labels",
                found=str(len(item)),
            )
        names = [*(spec.name for spec in specs), "labels"]
        return {name: _array(value) for name, value in zip(names, item, strict=False)}
    if hasattr(item, "shape") or isinstance(item, list | tuple):
        return {_only_input(specs, where): _array(item)}
    raise UsageError(
        f"{where} is not calibration data",
        needed="a mapping, a tuple, an array or a tensor",
        found=type(item).__name__,
    )


def _is_nested_numbers(item: Sequence[Any]) -> bool:
    first: Any = item
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(first, int | float)


def _is_batch(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> bool:
    """True unless a batched input has exactly one axis too few."""
    batched = batched_names(specs)
    return not any(
        spec.name in batched and spec.name in arrays and arrays[spec.name].ndim == len(spec.shape) - 1 for spec in specs
    )


def _with_batch_axis(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array]:
    batched = batched_names(specs)
    widened = {name for name in arrays if name in batched or (name in LABEL_KEYS and arrays[name].ndim == 0)}
    return {name: value[None] if name in widened else value for name, value in arrays.items()}
