"""Calibration data from text: ``.jsonl`` with one object a line, or ``.txt``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.batches import DEFAULT_BATCH, InputSpec, Sample
from tokcc.report.distances import Array
from tokcc.report.extras import require

__all__ = ["Lines", "read_lines", "text_samples"]

_DEFAULT_LENGTH = 512
"""Longest text, in tokens, when neither the engine nor the tokenizer says."""

_PAST = "past_key_values."


@dataclass(frozen=True)
class Lines:
    """Texts and their classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None


def read_lines(path: Path, *, whole: bool, limit: int | None, label_names: Sequence[str] = ()) -> Lines:
    """Read the texts of a file.

    Args:
        path: ``.jsonl`` with objects ``{"text": ..., "label": ...}`` or ``.txt``.
        whole: A ``.txt`` is one long text (language models) and not one text a line.
        limit: Read at most so many texts.
        label_names: The model's class names, for labels that are words.

    Raises:
        UsageError: The file cannot be read, a line is no such object, a label is unknown, or there is no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}", found=str(error), help="give a UTF-8 text file") from error
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError(f"no text in {path}", help="give at least one line")
    if path.suffix.lower() != ".jsonl":
        return Lines((content,) if whole else tuple(line for _, line in lines[:limit]))
    objects = [_object(path, number, line) for number, line in lines[:limit]]
    texts = tuple(_text(path, number, entry) for number, entry in objects)
    labelled = [(number, entry["label"]) for number, entry in objects if entry.get("label") is not None]
    if not labelled:
        return Lines(texts)
    if len(labelled) != len(texts):
        raise UsageError(
            f"some lines of {path.name} have a label and some have not",
            needed="a label on every line, or on none",
            found=f"{len(labelled)} of {len(texts)}",
        )
    return Lines(texts, tuple(_label(path, number, label, label_names) for number, label in labelled))


def _object(path: Path, number: int, line: str) -> tuple[int, Mapping[str, Any]]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path.name}:{number} is not JSON", found=str(error), help=_FORM) from error
    if not isinstance(entry, dict):
        raise UsageError(f"{path.name}:{number} is not a JSON object", found=type(entry).__name__, help=_FORM)
    return number, entry


_FORM = 'one object a line: {"text": "...", "label": 0}; the label may be left out'


def _text(path: Path, number: int, entry: Mapping[str, Any]) -> str:
    text = entry.get("text")
    if isinstance(text, str) and text.strip():
        return text
    raise UsageError(
        f"{path.name}:{number} has no text", found=", ".join(map(str, entry)) or "an empty object", help=_FORM
    )


def _label(path: Path, number: int, label: Any, label_names: Sequence[str]) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    names = [name.lower() for name in label_names]
    if isinstance(label, str) and label.lower() in names:
        return names.index(label.lower())
    raise UsageError(
        f"{path.name}:{number} has an unknown label",
        needed="a class index" + (f", or one of {', '.join(label_names[:8])}" if label_names else ""),
        found=repr(label),
    )


def text_samples(
    lines: Lines,
    specs: Sequence[InputSpec],
    preprocessor: Path | None,
    *,
    whole: bool,
    group: int | None,
    limit: int | None,
    notes: list[str],
) -> Iterator[list[Sample]]:
    """Tokenise texts in groups of one length each.

    Args:
        lines: The texts.
        specs: The engine's inputs; ``input_ids`` must be among them.
        preprocessor: Folder with the tokenizer's files.
        whole: Cut the token sequence into windows without padding (language models) and do not pad line by line.
        group: Texts per group, None = the default batch.
        limit: At most so many windows.
        notes: Takes sentences on what was assumed.

    Raises:
        UsageError: There is no tokenizer, the model takes no token ids, or an input cannot be made from text.
    """
    names = {spec.name: spec for spec in specs}
    if "input_ids" not in names:
        raise UsageError(
            "the model takes no text",
            needed="an input named input_ids",
            found=", ".join(map(str, specs)),
            help="give an .npz with one array per input name",
        )
    _check_inputs(specs)
    tokenizer = _tokenizer(preprocessor)
    length = names["input_ids"].shape[-1]
    fixed = length if isinstance(length, int) else None
    longest = fixed or min(int(getattr(tokenizer, "model_max_length", _DEFAULT_LENGTH)), _DEFAULT_LENGTH)
    size = group or DEFAULT_BATCH
    if whole:
        windows = _windows(tokenizer, lines.texts, longest, limit, fixed is not None)
        for start in range(0, len(windows), size):
            yield [_sample(ids, [1] * len(ids), names, tokenizer, None) for ids in windows[start : start + size]]
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        notes.append(f"texts: the tokenizer has no padding token; padded with {tokenizer.pad_token}")
    if "attention_mask" not in names:
        notes.append("texts: the model takes no attention_mask, so it sees the padding of short texts as text")
    for start in range(0, len(lines.texts), size):
        encoded = tokenizer(
            list(lines.texts[start : start + size]),
            padding="max_length" if fixed else "longest",
            truncation=True,
            max_length=longest,
        )
        yield [
            _sample(ids, mask, names, tokenizer, None if lines.labels is None else lines.labels[start + row])
            for row, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"], strict=True))
        ]


def _check_inputs(specs: Sequence[InputSpec]) -> None:
    made = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "cache_position"}
    foreign = [spec for spec in specs if spec.name not in made and not spec.name.startswith(_PAST)]
    if foreign:
        raise UsageError(
            f"input {foreign[0].name} cannot be made from text",
            needed=", ".join(map(str, specs)),
            help="give an .npz with one array per input name",
        )


def _tokenizer(preprocessor: Path | None) -> Any:
    if preprocessor is None:
        raise UsageError(
            "calibration with text needs the model's tokenizer, and none came with the model",
            help="compile from a Hugging Face folder, or give an .npz with the token ids",
        )
    require("transformers", "calibration with text")
    from transformers import AutoTokenizer

    folder = preprocessor if preprocessor.is_dir() else preprocessor.parent
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        # transformers 5 gives all of these for a folder without a (complete) tokenizer
        raise UsageError(
            f"cannot load a tokenizer from {folder}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            help="put tokenizer.json and tokenizer_config.json there, or give an .npz with the token ids",
        ) from error


def _windows(tokenizer: Any, texts: Sequence[str], length: int, limit: int | None, exact: bool) -> list[list[int]]:
    """Cut the concatenated texts into windows; an incomplete last one only stays where the length is free."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=not ids, truncation=False, verbose=False)["input_ids"])
    windows = [ids[start : start + length] for start in range(0, len(ids), length)][:limit]
    if exact and windows and len(windows[-1]) < length:
        windows.pop()
    if not windows:
        raise UsageError("the text is too short", needed=f"{length} tokens", found=str(len(ids)), help="give more text")
    return windows


def _sample(
    ids: Sequence[int], mask: Sequence[int], names: Mapping[str, InputSpec], tokenizer: Any, label: int | None
) -> Sample:
    real = np.asarray(mask, dtype=np.int64)
    positions = np.maximum(real.cumsum() - 1, 0)  # counts real tokens, so it holds for padding on either side
    inputs: dict[str, Array] = {
        "input_ids": np.asarray(ids, dtype=np.int64),
        "attention_mask": real,
        "position_ids": positions,
        "cache_position": np.arange(len(ids)),
        "token_type_ids": np.zeros(len(ids), dtype=np.int64),
    }
    inputs = {name: value for name, value in inputs.items() if name in names}
    for name, spec in names.items():
        if name.startswith(_PAST):  # an empty cache: the prompt is read in one go
            shape = tuple(size if isinstance(size, int) else 0 for size in spec.shape[1:])
            inputs[name] = np.zeros(shape, dtype=np.dtype(spec.dtype))
    return Sample(inputs, label=label, tokens=[str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))])
