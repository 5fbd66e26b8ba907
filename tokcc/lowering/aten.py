"""Programs in aten operations only, for backends that know no others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.kernels.decompositions import DECOMPOSITIONS, LOOPS, overload, triton_forms

__all__ = ["decompose", "large_sizes", "refuse_deep_sizes", "refuse_loops", "refuse_unwritten", "tokcc_calls"]

aten = torch.ops.aten

_EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_MOST_OPERATIONS = 50
"""Nine are traced in seconds, hundreds not in minutes."""
_FACTORS = (1021, 127, 31, 5)
"""Make of a few tokens more than blocks and pages hold; odd, so that they divide by nothing else than before."""
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


def decompose(
    program: Program, *, device: str = "cpu", forms: Mapping[str, Callable[..., Any]] | None = None
) -> ExportedProgram:
    """Return a program with aten operations in place of ``tokcc::`` ones.

    Args:
        program: The program; it is not changed.
        device: ``cuda``: operations with a Triton kernel become the ones that Inductor inlines.
        forms: What some operations become instead, by name.

    Raises:
        LoweringError: An operation has no such form, or sizes are out of reach.
    """
    refuse_loops(program, "aoti", "--backend onnx")
    refuse_deep_sizes(program, "aoti", "--backend onnx")
    exported = program.to_exported()
    # With examples torch checks what it assumed of the captured sizes, and a rebuilt model may be freer: slots of a
    # cache are more than the tokens of its mask.
    exported.example_inputs = None
    _settle_sizes(exported)
    forms = {**DECOMPOSITIONS, **(triton_forms() if device == "cuda" else {}), **(forms or {})}
    used = {name for name, _ in tokcc_calls(program.graph)}
    with warnings.catch_warnings(), large_sizes(exported):
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


@contextmanager
def large_sizes(exported: ExportedProgram) -> Iterator[None]:
    """Let the sizes that torch supposes while it traces be large ones.

    What is 0 or 1 for the supposed sizes becomes so for all: for an example of a few tokens, that would be the pages
    that a call adds to a cache. First axes stay: they are batches, which nothing is counted from.

    Args:
        exported: The program; what is supposed of it is as before when the context is left.

    Raises:
        LoweringError: Something was fixed that other sizes contradict: memory would be written that is not there.
    """
    inputs = [
        value
        for value in (node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None
    ]
    shapes = next((value.fake_mode.shape_env for value in inputs), None)
    if shapes is None:
        yield
        return
    before, known = dict(shapes.backed_var_to_val), len(shapes.guards)
    larger = _enlarged(inputs, shapes, _fitting(exported.graph))
    supposed = larger[0] if larger else before
    sizes = [size for value in inputs for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt)]
    hints = [size.node._hint for size in sizes]
    shapes.backed_var_to_val.update(supposed)
    for size in sizes if larger else ():
        size.node._hint = int(size.node.expr.xreplace(supposed))
    try:
        yield
    finally:
        shapes.backed_var_to_val.update(before)
        for size, hint in zip(sizes, hints, strict=True):
            size.node._hint = hint
    for guard in shapes.guards[known:]:
        if isinstance(guard.expr, sympy.Eq) and sympy.false in [guard.expr.xreplace(s) for s in (before, *larger)]:
            raise LoweringError(
                "the aoti backend cannot keep a size dynamic",
                needed="sizes that differ from 0, 1 and from one another for long inputs",
                found=f"tracing fixes {guard.expr}",
                help="make the length static, or compile with --backend onnx or --backend pt2",
            )


def _enlarged(inputs: Sequence[FakeTensor], shapes: ShapeEnv, fitting: Sequence[Any]) -> list[dict[Any, Any]]:
    """Return what can be supposed of all symbols, that of the factor first that most of them can bear."""
    before = dict(shapes.backed_var_to_val)
    leading: list[Any] = [value.shape[0] for value in inputs if value.ndim]
    batches = {symbol for size in leading if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    known = [*fitting, *(guard.expr for guard in shapes.guards)]
    known += [sympy.Le(symbol, shapes.var_to_range[symbol].upper) for symbol in before]
    known += [sympy.Eq(symbol, same) for symbol, same in shapes.replacements.items() if symbol in before]
    known = [each for each in known if each.xreplace(before) == sympy.true]
    found: dict[int, dict[Any, Any]] = {}
    for factor in _FACTORS:
        larger = {symbol for symbol in before if symbol not in batches}
        while True:
            # All by one factor: what is a sum of others stays their sum.
            supposed = {symbol: size * factor if symbol in larger else size for symbol, size in before.items()}
            broken = [each for each in known if each.xreplace(supposed) != sympy.true]
            if not broken:
                break
            larger -= set().union(*(each.free_symbols for each in broken))
        if supposed != before:
            found.setdefault(-sum(supposed[symbol] != size for symbol, size in before.items()), supposed)
    return [found[grown] for grown in sorted(found)]


def _fitting(graph: fx.Graph) -> list[Any]:
    """What sizes must be for pieces to lie inside axes of a fixed size, such as the slots of a cache."""
    found = []
    for node in graph.nodes:
        if node.target not in (aten.narrow.default, aten.slice.Tensor) or len(node.args) < 4:
            continue
        whole, axis, start, last = node.args[:4]
        size = whole.meta["val"].shape[axis]
        start, last = (each.meta["val"] if isinstance(each, fx.Node) else each for each in (start, last))
        if isinstance(size, int) and isinstance(last, torch.SymInt):
            end = last.node.expr
            if node.target == aten.narrow.default:
                end = end + (start.node.expr if isinstance(start, torch.SymInt) else start)
            found.append(sympy.Le(end, size))
    return found
