"""tokcc: an ahead-of-time compiler that bakes token reduction into exported transformer models.

``import tokcc`` is light: torch is loaded with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcc.backends.bundle import Bundle
    from tokcc.config import Policy
    from tokcc.errors import TokccError
    from tokcc.pipeline import compile, inspect, reduce

__version__ = "0.1.0"

__all__ = ["Bundle", "Policy", "TokccError", "__version__", "compile", "inspect", "presets", "reduce"]

_HOMES = {
    "compile": "tokcc.pipeline",
    "inspect": "tokcc.pipeline",
    "reduce": "tokcc.pipeline",
    "Bundle": "tokcc.backends.bundle",
    "Policy": "tokcc.config",
    "TokccError": "tokcc.errors",
}


def presets() -> dict[str, Policy]:
    """Return the preset library: names to policies with their default parameters."""
    from tokcc.config import load_policy
    from tokcc.passes.methods import library

    return {name: load_policy(name, presets=library()).policy for name in library()}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tokcc' has no attribute {name!r}")
