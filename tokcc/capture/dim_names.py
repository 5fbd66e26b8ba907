"""The names that the caller gave to dynamic sizes: ``torch.export`` forgets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokcc.ir.program import Program
from tokcc.ir.size_names import input_symbols, unique_names

__all__ = ["with_declared_names"]


def with_declared_names(program: Program, dynamic_shapes: Any) -> Program:
    """Name a program's sizes after the ``Dim`` objects in ``dynamic_shapes``; the others keep their default names.

    Args:
        program: A traced program.
        dynamic_shapes: What it was exported with, in ``torch.export``'s form, or None.
    """
    inputs = {node.name: input_symbols(node) for node in program.user_inputs}
    if isinstance(dynamic_shapes, tuple | list) and len(dynamic_shapes) == len(inputs):
        dynamic_shapes = dict(zip(inputs, dynamic_shapes, strict=True))
    declared: dict[Any, str] = {}
    for name, axis, label in _labels(dynamic_shapes):
        symbol = inputs.get(name, {}).get(axis)
        if symbol is not None:
            declared.setdefault(symbol, label)
    others = {symbol: name for symbol, name in program.size_names.items() if symbol not in declared}
    return program.naming_sizes(unique_names({**declared, **others}))


def _labels(shapes: Any) -> Iterator[tuple[str, int, str]]:
    """Yield (input, axis, name) of everything in a tree of shapes that is named after an input."""
    if not isinstance(shapes, Mapping):
        return
    for name, spec in shapes.items():
        if isinstance(spec, Mapping) and any(isinstance(key, str) for key in spec):
            yield from _labels(spec)
            continue
        axes = spec.items() if isinstance(spec, Mapping) else enumerate(spec) if isinstance(spec, tuple | list) else ()
        for axis, dim in axes:
            label = getattr(dim, "__name__", None)
            if isinstance(axis, int) and isinstance(name, str) and isinstance(label, str):
                yield name, axis, label
