"""What the modules that stand in a folder of plugins have in common: their head, their table, and lines from sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from string import Template
from typing import Any

from tokcc.plugins_trt.description import Plugin

__all__ = ["TYPES", "Kernels", "head", "letter_lines", "table", "tile_lines", "tupled", "used_names"]

Kernels = dict[tuple[int | float, ...], dict[str, dict[int, dict[str, Any]]]]
"""Attributes -> type -> tactic -> file, name, threads, shared, tile."""

TYPES = {"int32": "INT32", "int64": "INT64", "bool": "BOOL"}
"""Kinds of inputs that are not of the plugin's type, as TensorRT names them."""

_HEAD = Template('''\
"""$doc

$about

Tensors in, contiguous:
$tensors
Numbers that the kernels are compiled for:
$attributes
Arguments of a kernel, in order: the addresses of the tensors in, the 32-bit numbers
$scalars
and the addresses of
$outputs
"""

# Annotations are objects here: TensorRT reads them, and knows no strings.
import struct
from pathlib import Path
''')

_TABLE = Template('''\
HERE = Path(__file__).resolve().parent
ATTRIBUTES = $names

# Attributes -> type -> tactic -> kernel.
KERNELS = {
$entries
}

TYPES = {"FP16": trt.DataType.HALF, "BF16": trt.DataType.BF16, "FP32": trt.DataType.FLOAT}


def single(value):
    """Return a number in single precision: what ONNX attributes are."""
    return struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value


def kernels(*values):
    """Return the kernels for the values of the attributes."""
    key = tuple(single(value) for value in values)
    if key not in KERNELS:
        wanted = ", ".join(f"{name}={value}" for name, value in zip(ATTRIBUTES, key))
        raise ValueError(f"$plugin: no kernel was written for {wanted}; there are {list(KERNELS)}")
    return KERNELS[key]


def tactics_of(table, dtype):
    """Return the kernels of a type."""
    for label, tactics in table.items():
        if TYPES[label] == dtype:
            return tactics
    raise ValueError(f"$plugin: no kernel was written for {dtype}; there are {list(table)}")
''')


def head(plugin: Plugin, about: str) -> str:
    """Return the module's docstring and first imports."""
    kinds = {"float": "fp16, bf16 or fp32"}
    tensors = "".join(
        f"  {each.name} [{', '.join(each.axes)}] {kinds.get(each.kind, each.kind)}: {each.doc}"
        + (f" (with {each.flag} = 0: one element, not read)" if each.flag else "")
        + "\n"
        for each in plugin.inputs
    )
    return _HEAD.substitute(
        doc=plugin.doc,
        about=about,
        tensors=tensors,
        attributes="".join(f"  {each.name}: {each.doc}\n" for each in plugin.attributes),
        scalars="\n".join(f"  {name} = {value}" for name, value in plugin.scalars.items()),
        outputs="\n".join(f"  {each.name} [{', '.join(each.axes)}]: {each.doc}" for each in plugin.outputs),
    )


def table(plugin: Plugin, kernels: Kernels, name: str) -> str:
    """Return the table of kernels and the functions that look it up."""
    names = tuple(each.name for each in plugin.attributes)
    return _TABLE.substitute(names=names, entries=_entries(kernels), plugin=name)


def letter_lines(plugin: Plugin, expressions: Iterable[str], form: str, flag: str) -> list[str]:
    """Return lines that read the letters of expressions from shapes.

    Args:
        plugin: The plugin.
        expressions: Where letters are used.
        form: How axis ``{axis}`` of input ``{name}``, the ``{number}``-th, is written.
        flag: How the attribute ``{flag}`` is.
    """
    used = used_names(expressions)
    lines = []
    for letter, (number, axis) in plugin.letters.items():
        if letter in used:
            each = plugin.inputs[number]
            line = f"{letter} = {form.format(name=each.name, number=number, axis=axis)}"
            # What stands in for a tensor that is left out has one axis.
            lines.append(f"{line} if {flag.format(flag=each.flag)} else None" if each.flag else line)
    return lines


def tile_lines(kernels: Kernels, expressions: Iterable[str]) -> list[str]:
    """Return lines that read what expressions use of the kernel's tile."""
    (tactics, *_), *_ = (list(types.values()) for types in kernels.values())
    tile = next(iter(tactics.values()))["tile"]
    used = used_names(expressions)
    return [f'{name} = kernel["tile"]["{name}"]' for name in tile if name in used]


def used_names(expressions: Iterable[str]) -> set[str]:
    """Return the names in expressions."""
    return {name for each in expressions for name in re.findall(r"[A-Za-z_]\w*", each)}


def tupled(parts: Iterable[str]) -> str:
    """Return the text of a tuple."""
    listed = list(parts)
    return f"({', '.join(listed)}{',' if len(listed) == 1 else ''})"


def _entries(kernels: Kernels) -> str:
    lines = []
    for key, types in kernels.items():
        lines.append(f"    {key!r}: {{")
        for label, tactics in types.items():
            lines.append(f'        "{label}": {{')
            lines.extend(f"            {tactic}: {json.dumps(kernel)}," for tactic, kernel in tactics.items())
            lines.append("        },")
        lines.append("    },")
    return "\n".join(lines)
