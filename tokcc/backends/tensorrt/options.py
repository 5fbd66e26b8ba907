"""How the TensorRT folder is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokcc.backends.tensorrt.profiles import Shapes
from tokcc.errors import UsageError
from tokcc.plugins_trt import PLUGINS, SMS

__all__ = ["TensorrtOptions"]

_NAMES = ("plugins", "compute_capability")


@dataclass(frozen=True)
class TensorrtOptions:
    """How the TensorRT folder is made.

    Attributes:
        shapes: Smallest, usual and largest shapes of inputs.
        plugins: Kernels of ours that ``model_plugins.onnx`` uses; empty = there is no such graph.
        compute_capability: What plugins must run on, such as 80 for 8.0.
    """

    shapes: Shapes = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    compute_capability: tuple[int, ...] = SMS

    @classmethod
    def of(cls, settings: Mapping[str, Any], shapes: Shapes) -> TensorrtOptions:
        """Read what a user gave.

        Args:
            settings: ``plugins``, ``compute_capability``.
            shapes: By input.

        Raises:
            UsageError: There is no such option, or its value is none.
        """
        for name in settings:
            if name not in _NAMES:
                raise UsageError(f"the tensorrt backend has no option `{name}`", needed=" or ".join(_NAMES))
        plugins = _plugins(settings.get("plugins", False))
        given = settings.get("compute_capability", SMS)
        listed = given if isinstance(given, list | tuple) else [given]
        try:
            found = tuple(_capability(each) for each in listed)
        except (TypeError, ValueError) as error:
            raise UsageError(
                "`compute_capability` cannot be read", needed="numbers such as 8.0 or 80", found=repr(given)
            ) from error
        return cls(shapes, plugins, found)


def _plugins(given: Any) -> tuple[str, ...]:
    """Return the names of plugins; ``true`` means those that write nothing but their outputs."""
    if isinstance(given, bool):
        return tuple(name for name, plugin in PLUGINS.items() if plugin.functional) if given else ()
    names = tuple(given) if isinstance(given, list | tuple) else (given,)
    for name in names:
        if name not in PLUGINS:
            raise UsageError(
                f"there is no plugin `{name}`",
                needed=f"true, false, or names: {', '.join(PLUGINS)}",
                help="`tokcc compile --tensorrt-option plugins=true`",
            )
    return names


def _capability(given: Any) -> int:
    """Return 8.6, 86 and "8.6" as 86."""
    number = float(given)
    return round(number * 10) if number < 20 else int(number)
