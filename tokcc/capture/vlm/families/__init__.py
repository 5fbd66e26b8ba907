"""One file for each family of vision-language models; each has a ``FAMILY``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from tokcc.capture.vlm.family import Family

__all__ = ["families"]


@functools.cache
def families() -> Mapping[str, Family]:
    """Return the families by model type."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        found |= dict.fromkeys(family.model_types, family)
    return found
