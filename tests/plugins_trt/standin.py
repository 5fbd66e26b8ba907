"""A module ``tensorrt`` that records: NVIDIA's own ``tensorrt.plugin`` in Python runs on it, without the library.

The package of that name is taken from the wheel ``tensorrt-cu13-bindings``, whose compiled module does not load without
TensorRT's libraries. Sizes are trees, so that shapes and launches become numbers for any binding of their symbols.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

__all__ = ["Dim", "needs_wheel", "tensorrt", "wheel"]


@cache
def wheel() -> Path | None:
    """Return the folder of NVIDIA's package, or None."""
    spec = importlib.util.find_spec("tensorrt_bindings")  # not imported: that needs the libraries
    folders = [Path(place) / "plugin" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((folder for folder in folders if folder.is_dir()), None)


needs_wheel = pytest.mark.skipif(wheel() is None, reason="the wheel tensorrt-cu13-bindings is not installed")


class Dim:
    """``IDimensionExpr``: a number, a symbol, or an operation on two others."""

    def __init__(self, value: int | str | None = None, operation: Callable[[int, int], int] | None = None, *of: Dim):
        self.value, self.operation, self.of = value, operation, of

    def number(self, binding: Mapping[str, int]) -> int:
        """Return what it is for a binding of the symbols."""
        if self.operation is not None:
            return self.operation(*(each.number(binding) for each in self.of))
        return binding[self.value] if isinstance(self.value, str) else int(self.value or 0)

    def is_constant(self) -> bool:
        return all(each.is_constant() for each in self.of) if self.of else isinstance(self.value, int)

    def get_constant_value(self) -> int:
        return self.number({})


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "SUB": lambda a, b: a - b,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}
DimensionOperation = Enum("DimensionOperation", list(OPERATIONS))  # type: ignore[misc]


class Builder:
    """``IExprBuilder``."""

    def constant(self, value: int) -> Dim:
        assert type(value) is int
        return Dim(value)

    def operation(self, operation: Any, first: Dim, second: Dim) -> Dim:
        assert isinstance(first, Dim)
        assert isinstance(second, Dim)
        return Dim(None, OPERATIONS[operation.name], first, second)


class DimsExprs(list):  # type: ignore[type-arg]
    """A list of a length, or of sizes."""

    def __init__(self, given: Any) -> None:
        super().__init__([None] * given if isinstance(given, int) else given)


@dataclass
class TensorDesc:
    """``PluginTensorDesc``."""

    type: Any = None
    format: Any = None
    dims: tuple[int, ...] = ()
    scale: float = 1.0


@dataclass
class DynamicDesc:
    """``DynamicPluginTensorDesc``."""

    desc: TensorDesc = field(default_factory=TensorDesc)


@dataclass
class Field:
    """``PluginField``."""

    name: str
    data: Any
    type: Any


@dataclass
class Registry:
    """The plugin registry: creators by name and namespace."""

    creators: dict[tuple[str, str], Any] = field(default_factory=dict)

    def register_creator(self, creator: Any, namespace: str) -> bool:
        place = creator.name, namespace
        assert place not in self.creators, place
        assert creator.plugin_version == "1"
        assert creator.plugin_namespace == namespace
        self.creators[place] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        assert version == "1"
        return self.creators[name, namespace]


def _native(name: str) -> type:
    """Return a class whose constructor must be called, as those of compiled modules must."""

    def initialise(self: Any) -> None:
        self._initialised = {*getattr(self, "_initialised", ()), name}

    return type(name, (), {"__init__": initialise})


def _module() -> ModuleType:
    module: Any = ModuleType("tensorrt")
    module.__path__ = []
    types = ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8", "FP8", "INT4"]
    fields = ["FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "INT64", "CHAR", "UNKNOWN"]
    requests = ["UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT"]
    module.DataType = Enum("DataType", types)  # type: ignore[misc]
    module.TensorFormat = Enum("TensorFormat", ["LINEAR", "HWC"])  # type: ignore[misc]
    module.PluginFieldType = Enum("PluginFieldType", fields)  # type: ignore[misc]
    module.QuickPluginCreationRequest = Enum("QuickPluginCreationRequest", requests)  # type: ignore[misc]
    module.TensorRTPhase = Enum("TensorRTPhase", ["BUILD", "RUNTIME"])  # type: ignore[misc]
    module.PluginArgType = Enum("PluginArgType", ["INT"])  # type: ignore[misc]
    module.PluginArgDataType = Enum("PluginArgDataType", ["INT8", "INT16", "INT32"])  # type: ignore[misc]
    module.DimensionOperation = DimensionOperation
    module.IDimensionExpr, module.IExprBuilder, module.DimsExprs = Dim, Builder, DimsExprs
    module.PluginTensorDesc, module.DynamicPluginTensorDesc = TensorDesc, DynamicDesc
    module.PluginField, module.PluginFieldCollection = Field, list
    module.Dims = type("Dims", (tuple,), {"MAX_DIMS": 8})
    module.ITensor = type("ITensor", (), {})
    for name in (
        "ISymExpr", "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime",
        "IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick", "IPluginV3OneCore", "IPluginV3OneBuild",
        "IPluginV3OneBuildV2", "IPluginV3OneRuntime", "IPluginCreatorV3One",
    ):  # fmt: skip
        setattr(module, name, _native(name))
    module.Logger = type("Logger", (), {"WARNING": 2, "log": lambda self, severity, text: None})
    module.nptype = {kind: np.dtype("float32") for kind in module.DataType}.__getitem__
    registry = Registry()
    module.get_plugin_registry = lambda: registry
    module.registry = registry
    return module


@contextmanager
def tensorrt() -> Iterator[Any]:
    """Put the stand-in and NVIDIA's package in the place of TensorRT; afterwards all is as before."""
    folder = wheel()
    assert folder is not None
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in saved:
        del sys.modules[name]
    module: Any = _module()
    sys.modules["tensorrt"] = module
    try:
        spec = importlib.util.spec_from_file_location(
            "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module.plugin = sys.modules["tensorrt.plugin"] = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its strings have invalid escapes
            spec.loader.exec_module(module.plugin)
        yield module
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(saved)


class Setter(SimpleNamespace):
    """``ISymExprs`` and launch parameters: what is set is kept."""

    def __setitem__(self, index: int, value: Any) -> None:
        self.__dict__.setdefault("items", {})[index] = value
