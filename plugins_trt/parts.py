"""What a plugin's description is made of: tensors, attributes, and how a node of a graph uses it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "KINDS",
    "NAMESPACE",
    "SHARED_LIMIT",
    "SMS",
    "Attribute",
    "Call",
    "Input",
    "Operand",
    "Output",
    "PluginUse",
    "single",
]

NAMESPACE = "tokcc"
"""Of the plugins, in TensorRT's registry and in ONNX nodes."""

SMS: tuple[int, ...] = (80, 86, 89, 90, 100, 120)
"""The architectures that plugins are written for where nothing is said."""

SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory of a block. More must be asked for by who launches, and nothing says that TensorRT does."""

KINDS: Mapping[str, torch.dtype] = {"int32": torch.int32, "int64": torch.int64, "bool": torch.bool}
"""Types of inputs that are not of the plugin's own."""


@dataclass(frozen=True)
class Input:
    """A tensor that goes in, contiguous.

    Attributes:
        name: The argument's name.
        kind: ``float`` for the plugin's own type (fp16, bf16, fp32), else ``int32``, ``int64`` or ``bool``.
        axes: A letter for the size of each axis, or a number.
        doc: What it is.
        flag: Where the tensor may be left out: the attribute that says 1 when it is given. What stands in its place is
            one element of the type, shape ``[1]``, which is not read.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    doc: str
    flag: str = ""


@dataclass(frozen=True)
class Output:
    """A tensor that comes out, of the plugin's type.

    Attributes:
        name: Its name.
        axes: Letters of the inputs, or numbers.
        doc: What it is.
        alias: The input whose memory it is.
    """

    name: str
    axes: tuple[str, ...]
    doc: str
    alias: str = ""


@dataclass(frozen=True)
class Attribute:
    """A number that the kernel is compiled for.

    Attributes:
        name: Its name.
        type: ``int`` or ``float``.
        doc: What it is.
        axis: The letter whose size it is: that size must be known when the plugin is written.
    """

    name: str
    type: type[int] | type[float]
    doc: str
    axis: str = ""


@dataclass(frozen=True)
class Operand:
    """What goes in at a node: a type, and sizes of which those that are no ``int`` are dynamic."""

    dtype: torch.dtype
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """The arguments of an operation as those of its plugin; an input that is left out is None."""

    inputs: Mapping[str, Any]
    attributes: Mapping[str, int | float]


@dataclass(frozen=True)
class PluginUse:
    """A plugin with the type and numbers that its kernel is compiled for.

    Attributes:
        op: The plugin's name.
        dtype: ``fp16``, ``bf16`` or ``fp32``.
        attributes: All attributes, in the plugin's order; floats are single precision, as in ONNX.
    """

    op: str
    dtype: str
    attributes: Mapping[str, int | float] = field(hash=False)

    @property
    def key(self) -> tuple[int | float, ...]:
        """Return the attributes' values."""
        return tuple(self.attributes.values())


def single(value: float) -> float:
    """Return a number in single precision: what ONNX attributes are."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
