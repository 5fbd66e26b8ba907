"""The small op set without a second trace, for graphs that hardly differ from it.

``ExportedProgram.run_decompositions`` interprets the whole graph twice more, which takes longer than the export. All
it does to most models is to write views, copies and casts in another way: that is done here node by node. A graph with
anything else in it (operations in place, graphs inside, other composites) is left to torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._export.verifier import Verifier
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tokcc.ir.edit import evaluate, replace

__all__ = ["functional"]

aten = torch.ops.aten
_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd
_PLAIN_CALLS = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv}


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Return the program in the small op set: functional, with ``linear``, ``layer_norm`` and attention whole.

    Args:
        exported: As ``torch.export.export`` gives it; it is not changed.
    """
    if _within_reach(exported):
        rewritten = _rewritten(exported)
        if rewritten is not None:
            return rewritten
    decomposed: ExportedProgram = exported.run_decompositions({})
    return decomposed


def _within_reach(exported: ExportedProgram) -> bool:
    """Whether a graph holds only calls that stay as they are and calls that are rewritten here."""
    signature = exported.graph_signature
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT)
    if any(spec.kind not in kinds for spec in signature.input_specs):
        return False
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        return False
    return all(_simple(node) and _reachable(node) for node in exported.graph.nodes)


def _reachable(node: fx.Node) -> bool:
    if node.op == "call_function":
        return _rewrite_of(node.target) is not None or _stays(node.target)
    return node.op in ("placeholder", "output")


def _simple(node: fx.Node) -> bool:
    """Whether a value is a plain tensor, or sizes and plain tensors."""
    value = node.meta.get("val")
    items = value if isinstance(value, list | tuple) else (value,)
    plain = (int, float, bool, torch.SymInt, type(None))
    return all(
        isinstance(item, plain) or (isinstance(item, torch.Tensor) and item.layout is torch.strided) for item in items
    )


def _stays(target: Any) -> bool:
    """Whether torch's decomposition with an empty table leaves a call as it is."""
    if target in _PLAIN_CALLS:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    aliases = any(argument.alias_info is not None for argument in target._schema.arguments)
    implicit = torch._C._dispatch_has_kernel_for_dispatch_key(str(target._name), _IMPLICIT)
    return not (aliases and implicit)


def _rewrite_of(target: Any) -> Callable[[fx.Node], bool] | None:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and target._schema.is_mutable:
        return _in_place
    return _REWRITTEN.get(target)


def _rewritten(exported: ExportedProgram) -> ExportedProgram | None:
    graph = fx.Graph()
    names = {node: node.name for node in exported.graph.nodes}
    made: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(exported.graph, made))
    graph.output_node().meta = dict(exported.graph.output_node().meta)
    if any(made[node].name != name for node, name in names.items() if node.op == "placeholder"):
        return None
    for node in list(graph.nodes):
        rewrite = _rewrite_of(node.target)
        if rewrite is not None and not rewrite(node):
            return None
    return _program(exported, graph)


def _program(exported: ExportedProgram, graph: fx.Graph) -> ExportedProgram:
    old = exported.graph_signature
    outputs = [
        OutputSpec(spec.kind, _argument(value, spec.arg), spec.target)
        for spec, value in zip(old.output_specs, graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
    ]
    inputs = [InputSpec(spec.kind, spec.arg, spec.target, spec.persistent) for spec in old.input_specs]
    module = fx.GraphModule(torch.nn.Module(), graph)
    module.meta.update(exported.graph_module.meta)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature(input_specs=inputs, output_specs=outputs),
        state_dict=exported.state_dict,
        range_constraints=dict(exported.range_constraints),
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=[Verifier],
    )


def _argument(value: Any, before: Any) -> Any:
    if isinstance(value, fx.Node) and isinstance(before, TensorArgument | SymIntArgument):
        return type(before)(name=value.name)
    return before


# rewrites: each returns False where the graph is left to torch


def _forward(node: fx.Node) -> bool:
    """The call changes nothing."""
    source: Any = node.args[0]
    replace(node, source)
    return True


def _dropout(node: fx.Node) -> bool:
    return len(node.args) == 3 and node.args[2] is False and _forward(node)


def _cast(node: fx.Node) -> bool:
    """``to``: a copy where the type or the place differs."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if before.device != after.device:
        return False
    if before.dtype == after.dtype:
        return _forward(node)
    node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": after.dtype}
    return True


def _in_place(node: fx.Node) -> bool:
    """A tensor that nobody else reads is changed: the same call without doing it in place."""
    packet = getattr(aten, node.target._schema.name.split("::")[1].removesuffix("_"), None)  # type: ignore[union-attr]
    functional = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    source, value = node.args[0], node.meta["val"]
    mode = detect_fake_mode((value,))
    if functional is None or functional is node.target or not _stays(functional) or mode is None or not _fresh(source):
        return False
    node.target = functional
    evaluate(node, mode)
    result = node.meta["val"]
    if not isinstance(result, torch.Tensor) or (result.dtype, result.ndim) != (value.dtype, value.ndim):
        return False
    return all(statically_known_true(a == b) for a, b in zip(result.shape, value.shape, strict=True))


def _fresh(node: Any) -> bool:
    """Whether a node made its tensor, and has one reader."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return all(part.alias_info is None for part in (*node.target._schema.arguments, *node.target._schema.returns))


def _reshape(node: fx.Node) -> bool:
    sizes: Any = list(node.args[1])  # type: ignore[arg-type]
    if -1 in sizes:
        axis = sizes.index(-1)
        size = node.meta["val"].shape[axis]
        sizes[axis] = -1 if isinstance(size, int) else _known(node, size) or -1
    return _reshaped(node, sizes)


def _flatten(node: fx.Node) -> bool:
    source: Any = node.args[0]
    if source.meta["val"].ndim == 0:
        return _reshaped(node, [1])
    given: Any = (*node.args[1:], *(0, -1)[len(node.args) - 1 :])
    start, stop = (axis % source.meta["val"].ndim for axis in given)
    merged = source.meta["val"].shape[start : stop + 1]
    whole: Any = math.prod(merged) if all(isinstance(size, int) for size in merged) else -1
    sizes = _sizes(node, source, start, stop)
    return _reshaped(node, [*sizes[:start], whole, *sizes[stop + 1 :]])


def _unflatten(node: fx.Node) -> bool:
    source, axis, parts = node.args[:3]
    axis = axis % source.meta["val"].ndim  # type: ignore[union-attr]
    sizes = _sizes(node, source, axis, axis)
    sizes = [*sizes[:axis], *parts, *sizes[axis + 1 :]]  # type: ignore[misc]
    known = node.meta["val"].shape
    return _reshaped(
        node, [known[i] if size == -1 and isinstance(known[i], int) else size for i, size in enumerate(sizes)]
    )


def _expand_as(node: fx.Node) -> bool:
    node.target, node.args = aten.expand.default, (node.args[0], _sizes(node, node.args[1]))
    return True


def _transposed(node: fx.Node) -> bool:
    axes = list(reversed(range(node.meta["val"].ndim)))
    node.target, node.args = aten.permute.default, (node.args[0], axes)
    return True


def _chunk(node: fx.Node) -> bool:
    source: Any = node.args[0]
    axis = node.args[2] if len(node.args) > 2 else 0
    size, parts = source.meta["val"].shape[axis], node.args[1]
    if not isinstance(size, int) or not isinstance(parts, int) or size % parts:
        return False
    node.target, node.args, node.kwargs = aten.split.Tensor, (source, size // parts, axis), {}
    return True


def _sizes(node: fx.Node, source: Any, start: int = 0, stop: int = -1) -> list[Any]:
    """The sizes of a tensor before a node, numbers or nodes that read them; None for those from start to stop."""
    found: list[Any] = []
    for axis, size in enumerate(source.meta["val"].shape):
        if start <= axis <= stop:
            found.append(None)
        elif isinstance(size, int):
            found.append(size)
        else:
            found.append(_known(node, size) or _read(node, source, axis))
    return found


def _read(node: fx.Node, source: fx.Node, axis: int) -> fx.Node:
    with node.graph.inserting_before(node):
        made = node.graph.call_function(aten.sym_size.int, (source, axis))
    made.meta["val"] = source.meta["val"].shape[axis]
    return made


def _known(node: fx.Node, size: Any) -> fx.Node | None:
    """A node before this one that has the size."""
    for other in node.graph.nodes:
        if other is node:
            return None
        value = other.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return other  # type: ignore[no-any-return]  # a graph's nodes
    return None


def _reshaped(node: fx.Node, sizes: Any) -> bool:
    """Make it a reshape; what may be a copy is one: the strides of symbolic views are hard to reason about."""
    value = node.meta["val"]
    mode = detect_fake_mode((value,))
    if mode is None:
        return False
    node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], list(sizes)), {}
    shape: Sequence[Any] = value.shape
    with mode:
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return True


_REWRITTEN: dict[Any, Callable[[fx.Node], bool]] = {
    aten.contiguous.default: _forward,
    aten.dropout.default: _dropout,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten.to.other: _cast,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.expand_as.default: _expand_as,
    aten.numpy_T.default: _transposed,
    aten.chunk.default: _chunk,
}
