"""The preset library: one YAML file per method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from tokcc.config import Preset, load_preset

__all__ = ["library", "load_presets"]


def load_presets(folder: Path) -> dict[str, Preset]:
    """Return the presets of a folder by name, sorted.

    Args:
        folder: Holds one ``<name>.yaml`` for each preset.

    Raises:
        PolicyError: A file is not a valid preset.
    """
    presets = (load_preset(path) for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem))
    return {preset.name: preset for preset in presets}


@cache
def library() -> Mapping[str, Preset]:
    """Return the presets that come with tokcc."""
    return MappingProxyType(load_presets(Path(__file__).parent))
