"""Shapes that a TensorRT engine is made for: the smallest, the usual and the largest of each input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokcc.analysis.sizes import number
from tokcc.backends.tensorrt.cache_lengths import PAST, cache_lengths, token_size
from tokcc.errors import PlanError
from tokcc.ir.program import Program

__all__ = ["KINDS", "Profile", "Shapes", "make_profiles", "varying_axes"]

KINDS = ("min", "opt", "max")
Shapes = Mapping[str, Sequence[Sequence[int]]]
"""Smallest, usual and largest shape by input."""


@dataclass(frozen=True)
class Profile:
    """The shapes of one optimisation profile.

    Attributes:
        name: What it is for.
        shapes: Smallest, usual and largest shape of every input.
    """

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``build_engine.py`` reads it."""
        shapes = {name: dict(zip(KINDS, map(list, three), strict=True)) for name, three in self.shapes.items()}
        return {"name": self.name, "shapes": shapes}

    def option(self, kind: str) -> str:
        """Return the shapes as ``trtexec`` takes them: ``x:1x3x224x224,mask:1x197``."""
        place = KINDS.index(kind)
        return ",".join(f"{name}:{'x'.join(map(str, three[place]))}" for name, three in self.shapes.items())

    def covers(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether an engine of these shapes takes inputs of the given ones."""
        return all(
            all(low <= size <= high for low, size, high in zip(three[0], shapes[name], three[2], strict=True))
            for name, three in self.shapes.items()
        )

    def at(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return one shape of each input."""
        return {name: three[KINDS.index(kind)] for name, three in self.shapes.items()}


def varying_axes(shapes: Shapes) -> tuple[str, ...]:
    """Return the axes whose smallest and largest size differ, as ``--dynamic`` takes them."""
    return tuple(
        f"{name}:{axis}={low}..{high}"
        for name, three in shapes.items()
        for axis, (low, high) in enumerate(zip(three[0], three[-1], strict=True))
        if low != high
    )


def make_profiles(program: Program, example: Mapping[str, Sequence[int]], given: Shapes) -> tuple[Profile, ...]:
    """Settle every dynamic size.

    A size that the user gave shapes for is theirs; one with bounds goes from one bound to the other, with the example's
    in between; the length of a cache follows from how long the text may be and from what the policy leaves. A decoder
    gets a second profile, for single tokens.

    Args:
        program: What is lowered.
        example: Shapes of the example inputs.
        given: What the user gave, of some inputs.

    Raises:
        PlanError: Shapes that do not fit the program, or a dynamic axis without any.
    """
    inputs = dict(_inputs(program))
    sizes = _given(program, inputs, given)
    ranges = program.ranges()
    bindings = program.bindings(example)
    pasts = {name: shape for name, shape in inputs.items() if name.startswith(PAST)}
    own = {name: shape for name, shape in inputs.items() if name not in pasts}
    for shape in own.values():
        for symbol in _symbols(shape):
            low, high = ranges.get(symbol, (1, None))
            if symbol not in sizes and high is not None:
                sizes[symbol] = low, min(max(bindings[symbol], low), high), high
    _refuse_unknown(program, own, sizes)
    sizes = {**cache_lengths(program, inputs, sizes), **sizes}
    _refuse_unknown(program, pasts, sizes)
    first = Profile("default", {name: _three(shape, sizes) for name, shape in inputs.items()})
    token = token_size(inputs)
    if not pasts or token is None or sizes[token][0] > 1 or sizes[token][2] == 1:
        return (first,)
    single = {**sizes, token: (1, 1, 1)}
    return first, Profile("single tokens", {name: _three(shape, single) for name, shape in inputs.items()})


def _inputs(program: Program) -> Iterator[tuple[str, Sequence[Any]]]:
    for node in program.user_inputs:
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor):
            yield program.public_name(node), fake.shape


def _symbols(shape: Sequence[Any]) -> Iterator[Any]:
    for size in shape:
        if not isinstance(size, int):
            yield size.node.expr


def _three(shape: Sequence[Any], sizes: Mapping[Any, Sequence[int]]) -> Any:
    return tuple(
        tuple(number(size, {symbol: three[place] for symbol, three in sizes.items()}) for size in shape)
        for place in range(len(KINDS))
    )


def _given(program: Program, inputs: Mapping[str, Sequence[Any]], given: Shapes) -> dict[Any, tuple[int, int, int]]:
    """Return the sizes that follow from what the user gave."""
    ranges, decoder = program.ranges(), any(name.startswith(PAST) for name in inputs)
    found: dict[Any, tuple[int, int, int]] = {}
    for name, three in given.items():
        if name not in inputs:
            raise PlanError(
                f"shapes are given for `{name}`, which is no input",
                needed=f"one of {', '.join(list(inputs)[:8])}",
                help="`tokcc inspect` shows a model's inputs",
            )
        shape = inputs[name]
        if any(len(each) != len(shape) for each in three):
            raise PlanError(
                f"the shapes of `{name}` have another number of axes",
                needed=str(len(shape)),
                found=", ".join("x".join(map(str, each)) for each in three),
                help=f"`{name}` has the shape {_shown(program, shape)}",
            )
        for axis, size in enumerate(shape):
            low, usual, high = (int(each[axis]) for each in three)
            where = f"`{name}` axis {axis}"
            if isinstance(size, int):
                if {low, usual, high} != {size}:
                    raise PlanError(
                        f"{where} is fixed", needed=str(size), found=f"{low}, {usual}, {high}",
                        help="give the model a dynamic axis: `--dynamic NAME:AXIS=MIN..MAX`",
                    )  # fmt: skip
                continue
            symbol = size.node.expr
            least, most = ranges.get(symbol, (1, None))  # inputs that a policy adds have no bounds
            # What tracing assumed of a decoder's lengths, not what it needs: its attention is written anew.
            least = min(least, 1) if decoder else least
            if low < least or (most is not None and high > most):
                raise PlanError(
                    f"{where} has other bounds in the program",
                    needed=f"{least} to {'any' if most is None else most}",
                    found=f"{low} to {high}",
                    help="give shapes within them, or trace the model with other ones (`--dynamic`)",
                )
            if found.setdefault(symbol, (low, usual, high)) != (low, usual, high):
                raise PlanError(
                    f"{where} is a size that another input has, too, with other shapes",
                    needed=", ".join(map(str, found[symbol])),
                    found=f"{low}, {usual}, {high}",
                    help=f"`{program.size_name(size)}` is one size wherever it stands",
                )
    return found


def _refuse_unknown(program: Program, inputs: Mapping[str, Sequence[Any]], sizes: Mapping[Any, Any]) -> None:
    for name, shape in inputs.items():
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and size.node.expr not in sizes:
                shown = _shown(program, shape, "N")
                raise PlanError(
                    f"no shapes for a dynamic axis: `{name}` axis {axis} (`{program.size_name(size)}`)",
                    needed="the smallest, usual and largest size that the TensorRT engine is made for",
                    help=f"give `--min-shapes`, `--opt-shapes` and `--max-shapes {name}:{shown}` with numbers for N"
                    + ("; lengths of caches follow from those" if any(n.startswith(PAST) for n in inputs) else ""),
                )


def _shown(program: Program, shape: Sequence[Any], dynamic: str | None = None) -> str:
    """Return a shape as shape options have it, sizes that vary by name."""
    return "x".join(str(size) if isinstance(size, int) else dynamic or program.size_name(size) for size in shape)
