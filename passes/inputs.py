"""Inputs that a method adds to the engine: a text's embedding, scores of frames, the depth of every pixel.

A piece declares them; they stand behind the model's own inputs under the declared name, in every engine. One
declaration says all that others need to know: the report and the manifest what to feed, the parity check which random
values are valid, calibration without such data what to feed where the method is not to be guided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokcc.analysis.sizes import number
from tokcc.errors import PlanError
from tokcc.ir.builder import Builder
from tokcc.ir.program import Program
from tokcc.passes.piece import Piece, parts_of

__all__ = ["EngineInput", "Guided", "added_inputs", "declared_inputs", "random_values", "refuse_taken_names"]

Feeds = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class EngineInput:
    """One input that a piece reads.

    Attributes:
        name: What the caller calls it.
        shape: Numbers and symbols. The piece binds some when it reads the input (``B`` the batch, ``N`` the tokens,
            ``D`` a width); any other symbol is a size of its own, the same in all inputs.
        doc: One line: what it holds.
        dtype: Its type.
        unguided: What to feed, in all places, where the method is not to be guided.
        low: The smallest valid value; None = any number.
        high: The largest valid value; a symbol stands for its size.
        token: 1 where a token has this id, else 0: whoever knows the ids needs nobody to give it.
    """

    name: str
    shape: tuple[int | str, ...]
    doc: str
    dtype: torch.dtype = torch.float32
    unguided: float = 0.0
    low: float | None = None
    high: float | str | None = None
    token: int | None = None


class Guided(Piece):
    """A piece that reads inputs which the model does not have."""

    def inputs(self) -> Sequence[EngineInput]:
        """Return the inputs that it reads."""
        raise NotImplementedError

    def read(self, b: Builder, name: str, sizes: Mapping[str, Any], like: Any) -> Any:
        """Return a handle of one of the inputs.

        Args:
            b: The builder.
            name: Its declared name.
            sizes: What symbols of its shape stand for: numbers or sizes of the builder.
            like: A handle on the same device.
        """
        spec = next(spec for spec in self.inputs() if spec.name == name)
        return b.input(name, [sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape],
                       spec.dtype, b.device(like), least=1)  # fmt: skip


def declared_inputs(pieces: Iterable[Piece | None], where: str | None = None) -> tuple[EngineInput, ...]:
    """Return what pieces read, each input once.

    Raises:
        PlanError: Two pieces mean different things by one name.
    """
    found: dict[str, EngineInput] = {}
    for piece in parts_of(*pieces):
        for spec in piece.inputs() if isinstance(piece, Guided) else ():
            if found.setdefault(spec.name, spec) != spec:
                raise PlanError(
                    f"two pieces read an input `{spec.name}` of different kinds",
                    policy=where,
                    needed=f"{found[spec.name].dtype} {list(found[spec.name].shape)}",
                    found=f"{spec.dtype} {list(spec.shape)}",
                    help="give one of them another name",
                )
    return tuple(found.values())


def refuse_taken_names(program: Program, added: Sequence[EngineInput]) -> None:
    """Check that the model has no inputs of these names.

    Raises:
        PlanError: It has one.
    """
    own = [program.public_name(node) for node in program.user_inputs]
    for spec in added:
        if spec.name in own:
            raise PlanError(
                f"the policy adds an input `{spec.name}` ({spec.doc}), and the model has one of this name",
                needed="a name that is free",
                found=", ".join(own),
                help="name the model's input otherwise when you export it",
            )


def added_inputs(program: Program, declared: Sequence[EngineInput]) -> dict[str, EngineInput]:
    """Return those that a reduced program reads, by name: a reduction that removes nothing reads none."""
    present = {program.public_name(node) for node in program.user_inputs}
    return {spec.name: spec for spec in declared if spec.name in present}


def random_values(
    program: Program, declared: Sequence[EngineInput], feeds: Feeds, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return valid values for the inputs that a reduced program has besides the model's own.

    Args:
        program: The reduced program.
        declared: What its pieces declare.
        feeds: The model's own inputs.
        generator: Of the values, and of the sizes that are the inputs' own.
    """
    added = added_inputs(program, declared)
    nodes = {program.public_name(node): node for node in program.user_inputs}
    bindings = program.bindings({name: tuple(value.shape) for name, value in feeds.items()})
    shapes: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for name, spec in added.items():
        fake: Sequence[Any] = nodes[name].meta["val"].shape  # ints and SymInts; the stubs know ints only
        for size, symbol in zip(fake, spec.shape, strict=True):
            if not isinstance(size, int) and not size.node.expr.free_symbols <= bindings.keys():
                bindings[size.node.expr] = int(torch.randint(1, 6, (), generator=generator))
            length = number(size, bindings)
            shapes.setdefault(name, []).append(length)
            if isinstance(symbol, str):
                sizes[symbol] = length
    return {name: _values(spec, shapes[name], sizes, generator) for name, spec in added.items()}


def _values(
    spec: EngineInput, shape: Sequence[int], sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    if spec.low is None or spec.high is None:
        return torch.randn(list(shape), generator=generator).to(spec.dtype)
    high = sizes[spec.high] if isinstance(spec.high, str) else spec.high
    if spec.dtype.is_floating_point:
        return (torch.rand(list(shape), generator=generator) * (high - spec.low) + spec.low).to(spec.dtype)
    return torch.randint(int(spec.low), int(high) + 1, list(shape), generator=generator).to(spec.dtype)
