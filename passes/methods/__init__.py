"""The preset library: one YAML file per method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tokcc.config import Preset, load_preset

__all__ = ["library", "load_presets"]


class _Presets(Mapping[str, Preset]):
    """The presets of a folder by name, sorted; each is read when it is asked for, since a compile needs one of them."""

    def __init__(self, folder: Path) -> None:
        self._paths = {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}
        self._read: dict[str, Preset] = {}

    def __getitem__(self, name: str) -> Preset:
        if name not in self._read:
            self._read[name] = load_preset(self._paths[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths


def load_presets(folder: Path) -> dict[str, Preset]:
    """Return the presets of a folder by name, sorted.

    Args:
        folder: Holds one ``<name>.yaml`` for each preset.

    Raises:
        PolicyError: A file is not a valid preset.
    """
    return dict(_Presets(folder))


@cache
def library() -> Mapping[str, Preset]:
    """Return the presets that come with tokcc."""
    return _Presets(Path(__file__).parent)
