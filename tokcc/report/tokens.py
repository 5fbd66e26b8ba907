"""Calibration data of decoders: one long text, as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.arrays import read_numpy
from tokcc.report.batches import InputSpec
from tokcc.report.distances import Array
from tokcc.report.texts import read_lines

__all__ = ["TokenText", "load_tokens"]

_IDS = "input_ids"
_FORMS = "a .txt or .jsonl file, a folder of .txt files, or token ids in an .npz (`input_ids`) or .npy"
_CHARACTERS = 32
"""Characters that are tokenised for each token that is wanted: texts can be far longer than what is read."""

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TokenText:
    """A text to measure on.

    Attributes:
        ids: int64 ``[N]``.
        source: What it was made from, for the report.
    """

    ids: Array
    source: str


def load_tokens(data: Any, encode: Encode, *, shortest: int, longest: int) -> TokenText:
    """Read a text of any form; several become one.

    Args:
        data: A path, texts, token ids as array or sequence, a mapping with ``input_ids``, or a :class:`TokenText`.
        encode: The model's tokenizer; only called for text.
        shortest: Fewest tokens that are of use.
        longest: Most tokens that are of use.

    Raises:
        UsageError: The data is missing, damaged, of another kind, or too short.
    """
    source = Path(data).name or str(data) if isinstance(data, str | Path) else type(data).__name__
    if isinstance(data, TokenText):
        return data
    if isinstance(data, str | Path):
        ids = _from_path(Path(data), encode, longest)
    else:
        ids = _from_python(data, encode, longest)
    if len(ids) < shortest:
        raise UsageError(
            "the text is too short to measure on",
            needed=f"{shortest} tokens",
            found=f"{len(ids)} in {source}",
            help="give more text: contexts of 1024 tokens and more are where caches matter",
        )
    return TokenText(ids[:longest], source)


def _from_path(path: Path, encode: Encode, longest: int) -> Array:
    if not path.exists():
        raise UsageError(f"the calibration data {path} does not exist", help=f"give {_FORMS}")
    suffix = path.suffix.lower()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*.txt")) if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise UsageError(f"no texts in {path}", needed="files named *.txt", help=f"give {_FORMS}")
        return _encoded([text for file in files for text in read_lines(file, whole=True, limit=None).texts],
                        encode, longest)  # fmt: skip
    if suffix in {".txt", ".jsonl"}:
        return _encoded(read_lines(path, whole=suffix == ".txt", limit=None).texts, encode, longest)
    if suffix in {".npz", ".npy"}:
        arrays = read_numpy(path, [InputSpec(_IDS, "int64", ("batch", "sequence"))])
        return _from_arrays(arrays, path.name)
    raise UsageError(
        f"calibration data of this kind is not for decoders: {path.name}",
        needed=_FORMS,
        found=suffix or "a file without a suffix",
    )


def _from_python(data: Any, encode: Encode, longest: int) -> Array:
    if isinstance(data, Mapping):
        return _from_arrays(data, "the calibration mapping")
    if isinstance(data, Sequence) and data and all(isinstance(item, str) for item in data):
        return _encoded(data, encode, longest)
    try:
        array = np.asarray(data)
    except (TypeError, ValueError) as error:
        raise _no_data(type(data).__name__) from error
    return _flat(array, "the calibration data")


def _encoded(texts: Sequence[str], encode: Encode, longest: int) -> Array:
    text = "\n\n".join(texts)[: longest * _CHARACTERS]
    if not text.strip():
        raise UsageError("there is no text in the calibration data", help="give at least some pages")
    return np.asarray(list(encode(text)), dtype=np.int64)


def _from_arrays(arrays: Mapping[str, Any], what: str) -> Array:
    if _IDS not in arrays:
        raise UsageError(f"{what} holds no token ids", needed=f"an array `{_IDS}`", found=", ".join(map(str, arrays)))
    return _flat(np.asarray(arrays[_IDS]), what)


def _flat(array: Array, what: str) -> Array:
    if array.dtype.kind not in "iu" or array.ndim not in {1, 2}:
        raise _no_data(f"{what} as {array.dtype}{list(array.shape)}")
    return array.reshape(-1).astype(np.int64)


def _no_data(found: str) -> UsageError:
    return UsageError("this is not calibration data for a decoder", needed=_FORMS, found=found)
