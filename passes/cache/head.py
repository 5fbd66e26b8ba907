"""Compute a decoder's head for the last token alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.ir.edit import evaluate, fake_mode_of, insert_call, remove_dead
from tokcc.ir.program import PassResult, Program

__all__ = ["LastTokenHead", "last_token_outputs", "rowwise"]

aten = torch.ops.aten

_ROWWISE = {
    aten.linear.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten._to_copy.default,
    aten.clone.default,
}


@dataclass(frozen=True)
class LastTokenHead:
    """Let an output ``[B, S, V]`` hold the last token's row only: ``[B, 1, V]``.

    The row is taken in front of the head, so that a long prompt costs one row of the product with the vocabulary and
    not S of them. Generation reads nothing else.

    Attributes:
        output: Position of the output.
    """

    output: int

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        program = program.copied()
        value = program.output_values[self.output]
        mode = fake_mode_of(program)
        chain: list[fx.Node] = []
        current = value
        while rowwise(current):
            chain.append(current)
            current = current.args[0]
        first = chain[-1] if chain else program.output_node
        row = insert_call(program.graph, first, mode, aten.select.int, current, 1, -1)
        row = insert_call(program.graph, first, mode, aten.unsqueeze.default, row, 1)
        if chain:
            first.replace_input_with(current, row)
            for node in reversed(chain):
                evaluate(node, mode)
        else:
            values = tuple(row if i == self.output else v for i, v in enumerate(program.output_values))
            program.output_node.args = (values,)
        values = tuple(v.meta["val"] if isinstance(v, fx.Node) else v for v in program.output_values)
        program.output_node.meta["val"] = values
        remove_dead(program.graph)
        return PassResult(program.refreshed(), True)


def last_token_outputs(policy: LoadedPolicy, program: Program, carried: Collection[int]) -> Iterator[int]:
    """Yield the positions of the outputs of which a policy wants the last token's row only.

    Args:
        policy: The policy.
        program: The decoder.
        carried: Positions of the outputs that travel to the next call.

    Raises:
        PlanError: There is no such output, or it cannot be what the policy says.
    """
    names = {
        program.output_names[i]: position
        for i, position in enumerate(program.user_output_positions)
        if position not in carried
    }
    for name, contract in policy.policy.outputs.items():
        place = policy.where(("outputs", name))
        if name != "*" and name not in names:
            raise PlanError(
                f"the model has no output `{name}`",
                policy=place,
                needed="one of " + ", ".join(names),
                help='use one of these names, or `"*"` for all of them',
            )
        if contract not in ("full", "last_token"):
            raise PlanError(
                f"`{name}` of a decoder cannot be `{contract}`",
                policy=place,
                needed="`full`, or `last_token`: the row that generation reads",
                help=f"write `outputs: {{{name}: last_token}}`, or leave it out",
            )
        if contract == "last_token":
            yield from names.values() if name == "*" else [names[name]]


def rowwise(node: Any) -> bool:
    """Return whether a node treats every token by itself and has no other reader; further operands are not tokens."""
    if not isinstance(node, fx.Node) or node.target not in _ROWWISE or len(node.users) != 1:
        return False
    others = [a for a in node.args[1:] if isinstance(a, fx.Node)]
    return all(a.op == "placeholder" and len(a.meta["val"].shape) <= 2 for a in others) and isinstance(
        node.args[0], fx.Node
    )
