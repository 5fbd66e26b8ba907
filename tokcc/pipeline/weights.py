"""Weights of trained pieces in the bundle, so that its policy can be applied again without the author's files."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokcc.passes.trained import weight_file

__all__ = ["FOLDER", "bundle_weights"]

FOLDER = "weights"


def bundle_weights(policy: dict[str, Any], folder: Path | None, bundle: Path) -> dict[str, Any]:
    """Copy the weights that a policy names beside its lock file.

    Args:
        policy: The applied policy in the long form.
        folder: Where the author's policy lies.
        bundle: The bundle; files go to ``weights/`` in it, each once, and their hashes to its manifest.

    Returns:
        The policy with paths relative to the bundle.
    """
    policy = copy.deepcopy(policy)
    copied: dict[Path, str] = {}
    for piece in _pieces(policy.get("steps", ())):
        source = weight_file(piece["weights"], folder).resolve()
        if source not in copied:
            copied[source] = _copy(source, bundle)
        piece["weights"] = copied[source]
    return policy


def _pieces(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the pieces that name a file of weights, inside others as well."""
    if isinstance(data, dict):
        if "kind" in data and isinstance(data.get("weights"), str):
            yield data
        data = list(data.values())
    if isinstance(data, list | tuple):
        for item in data:
            yield from _pieces(item)


def _copy(source: Path, bundle: Path) -> str:
    target, count = bundle / FOLDER / source.name, 1
    while target.exists():  # another file of the same name
        count += 1
        target = target.with_name(f"{source.stem}_{count}{source.suffix}")
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    return target.relative_to(bundle).as_posix()
