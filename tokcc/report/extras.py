"""Optional packages: imported where they are used, and a clear sentence when they are missing."""

from __future__ import annotations

import importlib.util

from tokcc.errors import UsageError

__all__ = ["available", "require"]

_EXTRA_OF = {"PIL": "report", "jinja2": "report", "matplotlib": "report", "transformers": "hf"}
_PACKAGE_OF = {"PIL": "pillow"}


def available(*modules: str) -> bool:
    """Return whether all these modules can be imported; none of them is."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def require(module: str, purpose: str) -> None:
    """Check that an optional module is installed.

    Args:
        module: Its import name.
        purpose: What it is needed for, to complete "... needs X".

    Raises:
        UsageError: It is not installed.
    """
    if available(module):
        return
    package, extra = _PACKAGE_OF.get(module, module), _EXTRA_OF[module]
    raise UsageError(f"{purpose} needs {package}, which is not installed", help=f"pip install 'tokcc[{extra}]'")
