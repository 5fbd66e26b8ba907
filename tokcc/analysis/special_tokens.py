"""Tokens that are not parts of the input: class tokens, distillation tokens, registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import same_size
from tokcc.ir.program import Program
from tokcc.ir.value import Value

__all__ = ["middle_token", "special_tokens"]

aten = torch.ops.aten


def special_tokens(program: Program, entry: fx.Node, axis: int, axes: dict[str, Value]) -> tuple[int, int]:
    """Count leading and trailing special tokens.

    They are concatenated to the patches before the entry, or a head selects them by position.
    """
    before, behind = _concatenated(entry, axis)
    for node in program.graph.nodes:
        operand = node.args[0] if node.args else None
        if not isinstance(operand, fx.Node) or operand.name not in axes:
            continue
        value = axes[operand.name]
        if node.target is aten.select.int:
            dim, index = node.args[1], node.args[2]
            if (
                isinstance(dim, int)
                and isinstance(index, int)
                and value.axes[dim % value.rank]
                and any(f.space is not None and not f.space.is_batch for f in value.axes[dim % value.rank])
            ):
                before, behind = (max(before, index + 1), behind) if index >= 0 else (before, max(behind, -index))
    return before, behind


def middle_token(entry: fx.Node, axis: int) -> int | None:
    """Return the place of a single token that is concatenated between two parts of equally many tokens, or None."""
    sizes = _parts(entry, axis)
    if len(sizes) != 3 or not all(isinstance(s, int) for s in sizes):
        return None
    before, own, behind = sizes
    return before if own == 1 and before > 1 and abs(before - behind) <= 1 else None


def _concatenated(entry: fx.Node, axis: int) -> tuple[int, int]:
    sizes = _parts(entry, axis)
    if sizes and not all(isinstance(s, int) and s > 64 for s in sizes):
        # Of a class token and a single patch, the patch is the one behind.
        widest = max(range(len(sizes)), key=lambda i: (_hint(sizes[i]), i))
        before, behind = sizes[:widest], sizes[widest + 1 :]
        if all(isinstance(s, int) for s in (*before, *behind)):
            return sum(before), sum(behind)
    return 0, 0


def _parts(entry: fx.Node, axis: int) -> list[Any]:
    """Return the sizes of what is concatenated to the tokens before the entry; none when nothing is."""
    node: Any = entry
    size = entry.meta["val"].shape[axis]
    for _ in range(24):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return []
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            dim = (node.args[1] if len(node.args) > 1 else 0) % entry.meta["val"].ndim
            return [part.meta["val"].shape[dim] for part in parts] if dim == axis else []
        same = [
            n
            for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
            and n.op == "call_function"
            and n.meta["val"].ndim == entry.meta["val"].ndim
            and same_size(n.meta["val"].shape[axis], size)
        ]
        if not same:
            return []
        node = same[0]
    return []


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 0) if size.node.has_hint() else 2**31
