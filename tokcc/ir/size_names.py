"""Readable names of symbolic sizes, for engines and messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

__all__ = ["default_names", "dimension_name", "input_symbols", "unique_names"]

_LONGEST = 40


def input_symbols(node: fx.Node) -> dict[int, sympy.Symbol]:
    """Return the axes of an input that are a size symbol of their own."""
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return {}
    sizes: Sequence[Any] = fake.shape  # ints and SymInts; the stubs know ints only
    return {
        axis: size.node.expr
        for axis, size in enumerate(sizes)
        if not isinstance(size, int) and isinstance(size.node.expr, sympy.Symbol)
    }


def default_names(inputs: Iterable[fx.Node]) -> dict[sympy.Symbol, str]:
    """Name sizes after where they stand: ``batch`` for an axis 0 that all inputs share, else ``<input>_<axis>``."""
    found = {node.name: input_symbols(node) for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)}
    first = {axes.get(0) for axes in found.values()}
    batch = next(iter(first)) if len(first) == 1 else None
    names: dict[sympy.Symbol, str] = {}
    for name, axes in found.items():
        for axis, symbol in axes.items():
            names.setdefault(symbol, "batch" if symbol == batch else f"{name}_{axis}")
    return unique_names(names)


def unique_names(names: Mapping[sympy.Symbol, str]) -> dict[sympy.Symbol, str]:
    """Return the names as identifiers, a number behind those that two sizes would share."""
    result: dict[sympy.Symbol, str] = {}
    for symbol, name in names.items():
        base = re.sub(r"[^0-9A-Za-z_]", "_", name)
        unique, count = base, 1
        while unique in result.values():
            count += 1
            unique = f"{base}_{count}"
        result[symbol] = unique
    return result


def dimension_name(
    expression: sympy.Expr, names: Mapping[sympy.Symbol, str], definitions: Mapping[sympy.Symbol, sympy.Expr]
) -> str:
    """Name a size in terms of the inputs' sizes.

    A short sum or product is spelled out (``sequence-16``); a size that a reduction made is ``reduced_1``,
    ``reduced_2``, ... in the order in which the reductions made theirs.
    """
    made = {symbol: f"reduced_{number}" for number, symbol in enumerate(definitions, 1)}
    known = {symbol: sympy.Symbol(name) for symbol, name in {**made, **names}.items()}
    text = str(expression.xreplace(known)).replace(" ", "")
    if len(text) <= _LONGEST:
        return text
    parts = sorted(str(symbol) for symbol in expression.xreplace(known).free_symbols)
    return "size_of_" + "_".join(parts)
