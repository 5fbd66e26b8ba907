"""Compute what depends on no input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.edit import fake_mode_of, remove_dead
from tokcc.ir.program import PassResult, Program

__all__ = ["FoldConstants"]


@dataclass(frozen=True)
class FoldConstants:
    """Evaluate every node that depends on no user input and on no symbolic size.

    Position tables, interpolated relative-position biases and all-true masks become constants. A parameter alone is
    left as it is, and a result larger than its limit stays in the graph.

    Attributes:
        max_bytes: Largest constant that is made.
    """

    max_bytes: int = 256 * 2**20

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        placeholders = program.placeholders
        values: dict[fx.Node, Any] = {placeholders[name]: t for name, t in program.state_tensors().items()}
        pending: list[fx.Node] = []
        for node in program.graph.nodes:
            if node.op != "call_function" or not self._foldable(node, values):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            pending.append(node)
        mode = fake_mode_of(program)
        changed = False
        for node in pending:
            value = values[node]
            read = [user for user in node.users if user not in values]
            if not isinstance(value, torch.Tensor) or not read:
                continue
            program, constant = program.add_constant(
                f"tokcc_folded_{node.name}", _whole(value), mode.from_tensor(value, static_shapes=True)
            )
            for user in read:
                user.replace_input_with(node, constant)
            changed = True
        changed |= remove_dead(program.graph)
        return PassResult(program.refreshed(), changed)

    def _foldable(self, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            return getattr(node.target, "__name__", "") == "getitem" and all(n in values for n in node.all_input_nodes)
        if node.target._schema.is_mutable or not all(n in values for n in node.all_input_nodes):
            return False
        value = node.meta.get("val")
        tensors = [value] if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list | tuple) else []
        sizes: list[Any] = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
        return bool(sizes) and all(isinstance(size, int) and size <= self.max_bytes for size in sizes)


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is all of its storage: archives keep the storage, and warn of parts of one."""
    made = value.detach().contiguous()
    return made if made.untyped_storage().nbytes() == made.numel() * made.element_size() else made.clone()
