"""Files of measured numbers that a policy names: JSON or safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

__all__ = ["given_or_read", "read_profile"]


def read_profile(path: str, key: str) -> Any:
    """Return one entry of a profile as plain numbers and lists.

    Args:
        path: A JSON object, or a ``.safetensors`` file; from the working folder if it is not absolute.
        key: The entry's name, for instance ``heads``.

    Raises:
        ValueError: The file cannot be read or has no such entry; made for validators.
    """
    data = _tensors(path) if Path(path).suffix == ".safetensors" else _object(path)
    if key not in data:
        raise ValueError(f"the profile {path} has no entry `{key}`, but {', '.join(sorted(data)) or 'nothing'}")
    return data[key]


def given_or_read(value: Any, path: str | None, key: str, missing: str) -> Any:
    """Return what a policy gives, or the entry of the profile that it names; for validators.

    Args:
        value: What is given, if anything.
        path: The profile, or None.
        key: The entry's name.
        missing: What to say when there is neither.

    Raises:
        ValueError: Both are given, or neither, or the file cannot be read.
    """
    if value and path is not None:
        raise ValueError("they are given, and a profile as well")
    if path is not None:
        value = read_profile(path, key)
    if not value:
        raise ValueError(missing)
    return value


def _object(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the profile {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"the profile {path} is not a JSON object")  # noqa: TRY004  # validators take ValueError
    return data


def _tensors(path: str) -> dict[str, Any]:
    try:
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the profile {path} cannot be read: {error}") from error
