"""Tokens that are read beside those of a call: they attend, rate, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tokcc.errors import PlanError
from tokcc.ir.builder import Builder, same_size
from tokcc.ir.program import Program
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.head import rowwise
from tokcc.passes.cache.runs import run_of
from tokcc.passes.inputs import EngineInput

__all__ = ["LOOKAHEAD", "TOKENS", "Beside", "refuse_beside"]

aten = torch.ops.aten

LOOKAHEAD = EngineInput(
    "lookahead_ids",
    ("B", "lookahead"),
    "tokens that a draft expects behind the call's own, each row filled up with -1 at the end; no columns = none",
    torch.int64,
    unguided=-1,
)
"""Random values of the parity check are small numbers around 0, so tokens that every vocabulary has."""
TOKENS = "input_ids"
"""What decoders call the tokens of a call."""


@dataclass(frozen=True)
class Beside:
    """The tokens read beside, joined to the inputs of the model.

    Attributes:
        new: S: the call's own tokens.
        joined: What takes the place of the model's inputs, ``[B, S + A]`` and ``[B, T + A]``.
        reads: The first node of each output's head, and what it reads.
    """

    new: Any
    joined: dict[fx.Node, Any]
    reads: dict[fx.Node, fx.Node]

    @classmethod
    def of(cls, b: Builder, program: Program, mask: str | None, env: dict[fx.Node, Any]) -> Beside:
        """Declare the input, and put its tokens behind those of the call.

        Args:
            b: The builder.
            program: A program that :func:`refuse_beside` takes.
            mask: Name of the padding mask input, or None.
            env: The handles of its inputs.
        """
        ids = _input(program, TOKENS)
        own = env[ids]
        new = b.size(own, 1)
        given = b.input(LOOKAHEAD.name, [b.size(own, 0), "lookahead"], LOOKAHEAD.dtype, b.device(own))
        joined = {}
        with b.inserting("lookahead"):
            real = b.compare("ge", given, 0)
            for node in _by_token(program, ids):
                x = env[node]
                if node is ids:
                    more = b.clamp_min(given, 0)
                else:  # positions
                    count = b.add(b.arange(b.size(given, 1), given), 1)
                    more = b.add(run_of(b, x, 1, b.sub_sizes(new, 1), None), count)
                joined[node] = b.cat([x, b.cast(more, b.dtype(x))], 1)
            if mask is not None:
                node = _input(program, mask)
                joined[node] = b.cat([env[node], b.cast(real, b.dtype(env[node]))], 1)
        return cls(new, joined, dict(_read_by_heads(program)))

    def own(self, b: Builder, x: Any, axis: int) -> Any:
        """Return the call's own tokens of S + A."""
        return run_of(b, x, axis, 0, self.new)

    def narrowed(self, cut: CacheCut, key: Any) -> tuple[CacheCut, Any]:
        """Return the cut and the keys that are stored without the tokens read beside.

        What the own tokens attended to is computed again where it is read: it must not count what was read beside.
        """
        b = cut.b
        total = b.add_sizes(cut.past, self.new)

        def slots(x: Any, axis: int = 2) -> Any:
            return None if x is None else run_of(b, x, axis, 0, total)

        query, keys, value, real, bias = (
            self.own(b, cut.query, 2), slots(cut.key), slots(cut.value), slots(cut.real, 1), slots(cut.bias)
        )  # fmt: skip
        op = torch.ops.tokcc.cached_attention.default
        width = b.slice(value, 3, 0, 1)  # the attended values are not wanted
        both = b.call(op, query, keys, width, real, cut.window, cut.scale, cut.softcap, bias)
        made = replace(
            cut,
            query=query,
            key=keys,
            value=value,
            real=real,
            received=b.parts(both, 2)[1],
            new=self.new,
            total=total,
            weight=slots(cut.weight),
            bias=bias,
            wide=cut,
        )
        return made, keys if key is cut.key else slots(key)


def refuse_beside(program: Program, where: str, name: str) -> None:
    """Refuse decoders whose inputs or outputs cannot hold more tokens.

    Raises:
        PlanError: Says which.
    """
    ids = next((node for node in program.user_inputs if program.public_name(node) == TOKENS), None)
    if ids is None or ids.meta["val"].ndim != 2:
        raise PlanError(
            f"`{name}` reads tokens beside the prompt, and this model takes none",
            policy=where,
            needed=f"a model with an input `{TOKENS}` [batch, tokens]",
            found="inputs " + ", ".join(program.public_name(node) for node in program.user_inputs[:4]),
            help="export the decoder with token ids, or use a method that reads the prompt alone, such as `snapkv`",
        )
    known = (ids, *(node for node in _by_token(program, ids) if "position" in node.name))
    for node in program.user_inputs:
        fake = node.meta["val"]
        cached = isinstance(fake, torch.Tensor) and fake.ndim == 4
        if node not in known and not cached and "mask" not in node.name:
            raise PlanError(
                f"`{name}` reads tokens beside the prompt, and nothing is known of them for this input",
                policy=where,
                node=program.public_name(node),
                needed="a model that takes tokens, positions and a mask",
                help="export the model without this input, or use a method that reads the prompt alone",
            )
    for value in _outputs(program):
        fake = value.meta["val"]
        if fake.ndim < 2 or not same_size(fake.shape[1], ids.meta["val"].shape[1]):
            raise PlanError(
                f"`{name}` reads tokens beside the prompt, whose rows an output must not hold",
                policy=where,
                node=value.name,
                needed="outputs with a row for every token",
                found=f"{list(fake.shape)}",
                help="export the model without this output, or use a method that reads the prompt alone",
            )


def _input(program: Program, name: str) -> fx.Node:
    return next(node for node in program.user_inputs if name in (node.name, program.public_name(node)))


def _by_token(program: Program, ids: fx.Node) -> Iterator[fx.Node]:
    """Yield the inputs with a number for each of the call's tokens."""
    size = ids.meta["val"].shape[1]
    for node in program.user_inputs:
        fake = node.meta["val"]
        if isinstance(fake, torch.Tensor) and fake.ndim == 2 and same_size(fake.shape[1], size):
            yield node


def _outputs(program: Program) -> Iterator[fx.Node]:
    """Yield what leaves the model beside its caches."""
    for value in program.output_values:
        fake = value.meta.get("val") if isinstance(value, fx.Node) else None
        if isinstance(fake, torch.Tensor) and fake.ndim != 4:
            yield value


def _read_by_heads(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    for value in _outputs(program):
        current: Any = value
        first: fx.Node = program.output_node
        while rowwise(current):
            first, current = current, current.args[0]
        yield first, current
