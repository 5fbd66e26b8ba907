"""TensorRT plugins for the operations that native layers do not serve: data here, files by :func:`write_plugins`.

One file per plugin holds a ``PLUGIN``; they are found by folder. Nothing here needs TensorRT; writing needs triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.emit import write_plugins
from tokcc.plugins_trt.parts import NAMESPACE, SMS, Call, Operand, PluginUse

__all__ = ["NAMESPACE", "PLUGINS", "SMS", "Call", "Operand", "Plugin", "PluginUse", "plugin_for", "write_plugins"]


def _found() -> dict[str, Plugin]:
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__) if not info.ispkg)
    plugins: list[Plugin] = [module.PLUGIN for module in modules if hasattr(module, "PLUGIN")]
    return {plugin.op: plugin for plugin in plugins}


PLUGINS: Mapping[str, Plugin] = _found()
"""The plugins by name."""


def plugin_for(operation: str) -> Plugin | None:
    """Return the plugin that stands for an operation of a graph, such as ``tokcc::merge_tokens``, or None."""
    return next((plugin for plugin in PLUGINS.values() if plugin.replaces == operation), None)
