"""Programs in aten operations only, for backends that know no others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.kernels.decompositions import DECOMPOSITIONS, LOOPS, overload, triton_forms

__all__ = ["decompose", "refuse_deep_sizes", "refuse_loops", "refuse_unwritten", "tokcc_calls"]

aten = torch.ops.aten

_EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_MOST_OPERATIONS = 50
"""Nine are traced in seconds, hundreds not in minutes."""
_OVERWRITE = {"copy", "fill", "zero"}
"""Give their first argument's place other contents."""
_SHAPE_ONLY = {*_EMPTY, "full_like", "new_full", "new_ones", "new_zeros", "ones_like", "sym_size", "zeros_like"}


def tokcc_calls(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """Yield name and node of each ``tokcc::`` operation."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tokcc":
            yield node.target._opname, node


def refuse_loops(program: Program, backend: str, others: str) -> None:
    """Refuse a program that needs a loop.

    Args:
        program: The program.
        backend: Which backend it is for.
        others: The backends that can.

    Raises:
        LoweringError: Naming the operation and the step it comes from.
    """
    for name, node in tokcc_calls(program.graph):
        if name not in DECOMPOSITIONS:
            step = node.meta.get("tokcc")
            raise LoweringError(
                f"the {backend} backend cannot run `tokcc::{name}`",
                policy=f"step {step}" if step else None,
                node=node.name,
                needed="operations without a loop over what the model computes",
                found=LOOPS.get(name, "it has no form in aten operations"),
                help=f"compile with {others}, or choose a method that picks its tokens all at once",
            )


def refuse_deep_sizes(program: Program, backend: str, others: str) -> None:
    """Refuse token counts that take too many operations on the inputs' sizes to write down.

    The compiler writes every size in terms of the inputs', and what layer after layer makes of a dynamic length by
    smallest and largest values soon has thousands of terms: it does not end.

    Args:
        program: The program.
        backend: Which backend it is for.
        others: The backends that can.

    Raises:
        LoweringError: There are such sizes.
    """
    operations: dict[Any, int] = {}
    for symbol, expression in program.symbols.items():
        operations[symbol] = int(expression.count_ops()) + sum(
            operations.get(part, 0) for part in expression.free_symbols
        )
    most = max(operations.values(), default=0)
    if most > _MOST_OPERATIONS:
        raise LoweringError(
            f"the {backend} backend cannot follow how the number of tokens depends on a dynamic length",
            needed=f"at most {_MOST_OPERATIONS} operations on the inputs' sizes",
            found=f"{most}",
            help=f"make the length static (not the batch), use `keep` at few layers, or compile with {others}",
        )


def decompose(program: Program, *, device: str = "cpu") -> ExportedProgram:
    """Return a program with aten operations in place of ``tokcc::`` ones.

    Args:
        program: The program; it is not changed.
        device: ``cuda``: operations with a Triton kernel become the ones that Inductor inlines.

    Raises:
        LoweringError: An operation has no such form, or sizes are out of reach.
    """
    refuse_loops(program, "aoti", "--backend onnx")
    refuse_deep_sizes(program, "aoti", "--backend onnx")
    exported = program.to_exported()
    _settle_sizes(exported)
    forms = {**DECOMPOSITIONS, **(triton_forms() if device == "cuda" else {})}
    used = {name for name, _ in tokcc_calls(program.graph)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated pytree classes
        # Also of a graph without them: copies the graph, which belongs to the program.
        result: ExportedProgram = exported.run_decompositions({overload(name): forms[name] for name in used})
    left = [name for name, _ in tokcc_calls(result.graph) if not name.endswith("_triton")]
    if left:
        raise LoweringError("operations are left that aten does not have", found=f"tokcc::{left[0]}")
    refuse_unwritten(result.graph)
    return result


def refuse_unwritten(graph: fx.Graph) -> None:
    """Refuse a graph that reads memory which nothing wrote: what is left where a kernel's launch was lost.

    Raises:
        LoweringError: Naming the node.
    """
    for node in graph.nodes:
        if _name(node) not in _EMPTY or _holds_nothing(node):
            continue
        for user in node.users:
            overwritten = _name(user) in _OVERWRITE and user.args[0] is node and node not in user.args[1:]
            if not overwritten and _name(user) not in _SHAPE_ONLY:
                raise LoweringError(
                    "the program reads memory that nothing wrote", node=node.name, found=f"`{user.name}` reads it"
                )


def _name(node: fx.Node) -> str:
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" else ""


def _holds_nothing(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    sizes: Sequence[Any] = value.shape  # ints and SymInts; the stubs know ints only
    return any(isinstance(size, int) and size == 0 for size in sizes)


def _settle_sizes(exported: ExportedProgram) -> None:
    """Tell torch that the sizes which reductions introduced are accounted for.

    It takes symbols that no operation has returned yet for a defect of the first one that it traces; these are made by
    arithmetic on the inputs' sizes, which is traced again.
    """
    for node in exported.graph.nodes:
        value: Any = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            value.fake_mode.shape_env.pending_fresh_unbacked_symbols.clear()
