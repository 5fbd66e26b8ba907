"""Symbolic sizes that stay free while a graph is rebuilt.

Evaluating an operation on fake tensors may decide something by the example's own sizes (is this axis of size one?) and
record it, which quietly fixes a size that the caller wanted to vary. Here it is kept from happening where torch can be
asked to, and found where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

__all__ = ["Loss", "SizeWatch", "free_size", "size_oblivious"]


def size_oblivious() -> AbstractContextManager[Any]:
    """Return a context in which broadcasting does not ask whether a symbolic size happens to be one."""
    patch: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patch


def free_size(shape_env: ShapeEnv, hint: int, number: int) -> Any:
    """Return a new size symbol of which nothing is known: it may be 0, 1 or, as a step of arithmetic, negative."""
    source = ConstantSource(f"tokcc_size_{number}")
    return shape_env.create_unspecified_symint_and_symbol(hint, source, DimDynamic.DYNAMIC)


@dataclass(frozen=True)
class Loss:
    """A size of an input that cannot vary any more as the caller said.

    Attributes:
        symbol: The size.
        axis: Which axis it is, for messages.
        node: The first node whose evaluation did it, or None when it was not seen to happen.
        wanted: The sizes it could take.
        left: The sizes it can take now.
    """

    symbol: sympy.Symbol
    axis: str
    node: fx.Node | None
    wanted: str
    left: str


@dataclass
class SizeWatch:
    """Watches the symbolic sizes of the inputs.

    Attributes:
        shape_env: Where they live; None for a program without symbolic sizes.
    """

    shape_env: ShapeEnv | None
    _axes: dict[sympy.Symbol, str] = field(default_factory=dict)
    _ranges: dict[sympy.Symbol, Any] = field(default_factory=dict)
    _equal: dict[sympy.Symbol, Any] = field(default_factory=dict)
    _fine: dict[sympy.Symbol, Any] = field(default_factory=dict)
    """The ranges that were compared already: this is asked behind every node, and comparing is slow."""
    _first: Loss | None = None

    def watch(self, name: str, sizes: Sequence[Any], least: int = 0) -> None:
        """Watch the sizes of one input; that those it has not seen yet are at least ``least`` is no loss."""
        if self.shape_env is None:
            return
        for axis, size in enumerate(sizes):
            # The node's own expression: the public one has replacements applied, which is what is looked for.
            symbol = None if isinstance(size, int) else size.node._expr
            if isinstance(symbol, sympy.Symbol) and symbol not in self._axes:
                self._axes[symbol] = f"axis {axis} of `{name}`"
                known = self.shape_env.var_to_range.get(symbol)
                self._ranges[symbol] = known if known is None else known & ValueRanges(least, int_oo)
                self._equal[symbol] = self.shape_env.replacements.get(symbol)  # the trace itself may have equated sizes

    def after(self, node: fx.Node) -> None:
        """Remember the first node behind which a size is less free than before."""
        if self._first is None:
            self._first = self._found(node)

    def loss(self) -> Loss | None:
        """Return what was lost, or None."""
        return self._first or self._found(None)

    def _found(self, node: fx.Node | None) -> Loss | None:
        env = self.shape_env
        if env is None:
            return None
        for symbol, axis in self._axes.items():
            wanted, left = self._ranges[symbol], env.var_to_range.get(symbol)
            other = env.replacements.get(symbol)
            # A sum of sizes that tokcc derived is another name of the same size; a number or another input's is not.
            if other not in (None, self._equal[symbol]) and other.free_symbols <= self._axes.keys():
                return Loss(symbol, axis, node, _interval(wanted), f"only {other}")
            if wanted is None or left is None or left is self._fine.get(symbol):
                continue
            if left.lower > wanted.lower or left.upper < wanted.upper:
                return Loss(symbol, axis, node, _interval(wanted), _interval(left))
            self._fine[symbol] = left
        return None


def _interval(bounds: Any) -> str:
    if bounds is None:
        return "any size"
    return f"{bounds.lower} to {bounds.upper}" if bounds.upper.is_Integer else f"{bounds.lower} and more"
