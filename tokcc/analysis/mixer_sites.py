"""Finding state-space mixers: recurrences over tokens that one branch of a block runs, in one direction or several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import tokcc.kernels  # registers the operations
from tokcc.analysis.dominators import Stream

__all__ = ["MixerSite", "mixer_sites"]

aten = torch.ops.aten
assert tokcc.kernels is not None
_PROJECTIONS = {aten.linear.default, aten.matmul.default, aten.addmm.default}


@dataclass(frozen=True)
class MixerSite:
    """One state-space mixer.

    Attributes:
        states: Names of its recurrences, in execution order.
        output: Name of what its output projection reads: all directions together, gated, one vector for each token.
    """

    states: tuple[str, ...]
    output: str

    @property
    def mixes(self) -> str:
        """Name of the node where tokens have met: the last state."""
        return self.states[-1]


def mixer_sites(stream: Stream) -> list[MixerSite]:
    """Return the mixers between neighbouring points that everything passes, in execution order."""
    found: list[MixerSite] = []
    for states in stream.groups(lambda node: node.target is torch.ops.tokcc.recurrence.default):
        behind = next((d for d in stream.dominators if stream.order[d] > stream.order[states[-1]]), None)
        output = None if behind is None else _projected(behind, states)
        if output is not None:
            found.append(MixerSite(tuple(node.name for node in states), output.name))
    return found


def _projected(behind: fx.Node, states: list[fx.Node]) -> fx.Node | None:
    """Follow the branch back from where it joins the stream to what its last projection reads."""
    after = _behind(states, behind)
    node = behind
    while True:
        operands = [operand for operand in node.all_input_nodes if operand in after]
        if len(operands) != 1:
            return None
        if node.target in _PROJECTIONS:
            return operands[0]
        node = operands[0]


def _behind(states: list[fx.Node], end: fx.Node) -> set[fx.Node]:
    after = set(states)
    node = states[0]
    while node is not end:
        node = node.next
        if any(operand in after for operand in node.all_input_nodes):
            after.add(node)
    return after
