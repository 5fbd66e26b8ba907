"""Reading one preset file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from tokcc.config.failures import Origin
from tokcc.config.preset import Preset
from tokcc.config.yaml_lines import read_yaml
from tokcc.errors import PolicyError

__all__ = ["load_preset"]


def load_preset(path: Path) -> Preset:
    """Read and validate a preset; its name is the file's name.

    Raises:
        PolicyError: The file is not a valid preset.
    """
    located = read_yaml(path, what="preset")
    origin = Origin(path.name, located.lines)
    try:
        preset = Preset.model_validate(located.data)
    except (ValidationError, PydanticCustomError) as error:
        raise origin.refusal(error, located.data) from error
    if preset.name != path.stem:
        raise PolicyError(
            "a preset is not named like its file",
            policy=origin.where(("name",), located.data),
            needed=f"`{path.stem}`",
            found=f"`{preset.name}`",
        )
    return preset
