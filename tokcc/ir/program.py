"""The program a pass receives and returns: an exported graph together with its state.

A :class:`Program` is `torch.export`'s lifted form (parameters, buffers and constants are placeholders), held in one
place so that passes can add constants and rebuild the graph, and turned back into an ``ExportedProgram`` at any time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)
from torch.export.graph_signature import OutputSpec as ExportOutputSpec
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tokcc.errors import VerifyError
from tokcc.ir.size_names import default_names, dimension_name, input_symbols

__all__ = ["Pass", "PassResult", "Program"]


@dataclass(frozen=True)
class Program:
    """A traced model in lifted form.

    Attributes:
        graph: The FX graph; placeholders are ordered parameters, buffers, constants, then user inputs.
        signature: Names and kinds of every placeholder and output.
        state_dict: Parameters and persistent buffers by fully qualified name.
        constants: Lifted constants and non-persistent buffers by fully qualified name.
        origin: The exported program this one came from; its ranges, call specs and verifiers are reused.
        notes: What passes want the report to say.
        symbols: Definitions of the size symbols that reductions introduced, by symbol.
        output_names: One name per output: the keys of a dict that the model returns, else ``output`` or ``output_0``.
        size_names: Names of the inputs' symbolic sizes, by symbol.
        input_names: What the caller calls the inputs, by placeholder: nested ones have dots.
    """

    graph: fx.Graph
    signature: ExportGraphSignature
    state_dict: dict[str, Any]
    constants: dict[str, Any]
    origin: ExportedProgram
    notes: tuple[str, ...] = field(default=())
    output_names: tuple[str, ...] = ()
    input_names: Mapping[str, str] = field(default_factory=dict)
    symbols: Mapping[Any, Any] = field(default_factory=dict)
    size_names: Mapping[Any, str] = field(default_factory=dict)

    @classmethod
    def from_exported(cls, exported: ExportedProgram) -> Program:
        """Take over an exported program; its graph is used as it is, not copied."""
        program = cls(
            graph=exported.graph,
            signature=exported.graph_signature,
            state_dict=dict(exported.state_dict),
            constants=dict(exported.constants),
            origin=exported,
            output_names=_output_names(exported),
            input_names=_input_names(exported),
        )
        return program.naming_sizes(default_names(program.user_inputs))

    def to_exported(self) -> ExportedProgram:
        """Return a self-contained ``ExportedProgram`` over this graph."""
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        used = {spec.target for spec in self.signature.input_specs if spec.target is not None}
        # Examples without the inputs that passes added fit no call: torch binds them whenever it makes a module.
        examples = self.origin.example_inputs
        fit = len(pytree.tree_leaves(examples)) >= len(self.user_inputs)
        return ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=self.signature,
            state_dict={name: value for name, value in self.state_dict.items() if name in used},
            range_constraints=self._range_constraints(),
            module_call_graph=[self._call_entry()],
            example_inputs=examples if fit else None,
            constants={name: value for name, value in self.constants.items() if name in used},
            verifiers=list(self.origin.verifiers),
        )

    def _range_constraints(self) -> Any:
        """The ranges of the model's sizes, and of those of inputs that passes added: any size."""
        ranges = dict(self.origin.range_constraints)
        for node in self.user_inputs:
            for symbol in input_symbols(node).values():
                ranges.setdefault(symbol, ValueRanges(0, int_oo))
        return ranges

    def _call_entry(self) -> Any:
        """The root's calling convention; new outputs join a dict, or end a tuple."""
        entry = self.origin.module_call_graph[0]
        signature = self._with_new_inputs(entry.signature)
        count = len(self.user_output_positions)
        if signature is None or signature.out_spec.num_leaves == count:
            return entry if signature is entry.signature else ModuleCallEntry(fqn=entry.fqn, signature=signature)
        old = signature.out_spec.num_leaves
        tree: Any = pytree.tree_unflatten(list(range(old)), signature.out_spec)
        if isinstance(tree, Mapping):
            tree = {**tree, **{self.output_names[i]: i for i in range(old, count)}}
        else:
            tree = (*(tree if isinstance(tree, list | tuple) else (tree,)), *range(old, count))
        changed = copy.copy(signature)
        changed.out_spec = pytree.tree_structure(tree)
        return ModuleCallEntry(fqn=entry.fqn, signature=changed)

    def _with_new_inputs(self, signature: Any) -> Any:
        """The calling convention with inputs that passes added: they are given by name."""
        names = [node.name for node in self.user_inputs]
        if signature is None or signature.in_spec.num_leaves >= len(names):
            return signature
        old = signature.in_spec.num_leaves
        args, kwargs = pytree.tree_unflatten(list(range(old)), signature.in_spec)
        changed = copy.copy(signature)
        new = {names[i]: i for i in range(old, len(names))}
        changed.in_spec = pytree.tree_structure((args, {**kwargs, **new}))
        if signature.forward_arg_names is not None:
            changed.forward_arg_names = [*signature.forward_arg_names, *new]
        return changed

    @property
    def call_signature(self) -> Any:
        """How the exported module is called, with inputs and outputs that passes added; None = flat."""
        return self._call_entry().signature

    def public_name(self, node: fx.Node) -> str:
        """Return what the caller calls an input."""
        return self.input_names.get(node.name, node.name)

    def bindings(self, inputs: Mapping[str, Sequence[int]]) -> dict[Any, int]:
        """Return the value of every size symbol that follows from given input shapes."""
        known: dict[Any, int] = {}
        for node in self.user_inputs:
            fake, shape = node.meta.get("val"), inputs.get(self.public_name(node))
            if not isinstance(fake, torch.Tensor) or shape is None:
                continue
            sizes: Sequence[Any] = fake.shape  # ints and SymInts; the stubs know ints only
            for size, number in zip(sizes, shape, strict=True):
                if isinstance(size, int):
                    continue
                # A size that was found equal to another one has that one's symbol now; definitions may have either.
                for expression in (size.node.expr, size.node._expr):
                    if expression.is_symbol:
                        known[expression] = int(number)
        return self.settled(known)

    def settled(self, known: Mapping[Any, int]) -> dict[Any, int]:
        """Return known sizes and all that reductions made of them, by every symbol that torch has for them.

        Programs of one trace share their symbols: a size that was found equal to one of another program has that
        one's symbol from then on, and its definition the earlier one.
        """
        found = dict(known)
        inputs = (node.meta.get("val") for node in self.user_inputs)
        sizes: Iterator[Any] = (size for fake in inputs if isinstance(fake, torch.Tensor) for size in fake.shape)
        environment = next((size.node.shape_env for size in sizes if not isinstance(size, int)), None)
        for symbol, definition in self.symbols.items():
            expression = definition
            if environment is not None and not expression.free_symbols <= found.keys():
                expression = environment.replace(definition)
            if not expression.free_symbols <= found.keys():
                continue
            found[symbol] = int(expression.xreplace({k: sympy.Integer(v) for k, v in found.items()}))
            now = symbol if environment is None else environment.replace(symbol)
            if now.is_symbol:
                found.setdefault(now, found[symbol])
        return found

    def ranges(self) -> dict[Any, tuple[int, int | None]]:
        """Return the smallest and largest value of every size symbol of the inputs; None = unbounded."""
        return {
            symbol: (int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else None)
            for symbol, bounds in self.origin.range_constraints.items()
        }

    def size_name(self, size: Any) -> str:
        """Return a readable name of a symbolic size, such as ``batch`` or ``sequence-16``."""
        return dimension_name(size.node.expr, self.size_names, self.symbols)

    def naming_sizes(self, names: Mapping[Any, str]) -> Program:
        """Return the program with other names of its inputs' sizes."""
        return replace(self, size_names=dict(names))

    def with_graph(self, graph: fx.Graph, signature: ExportGraphSignature | None = None) -> Program:
        """Return the same program over another graph."""
        return replace(self, graph=graph, signature=signature or self.signature)

    def copied(self) -> Program:
        """Return the same program over a graph of its own, for passes that edit in place."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        copied = replace(self, graph=graph)
        copied.output_node.meta = dict(self.output_node.meta)
        return copied

    def noting(self, *notes: str) -> Program:
        """Return the program with further notes for the report."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        """All placeholders by name."""
        return {node.name: node for node in self.graph.nodes if node.op == "placeholder"}

    def input_specs(self) -> Iterator[tuple[fx.Node, InputSpec]]:
        """Yield each placeholder with its specification, in order."""
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(nodes) != len(self.signature.input_specs):
            raise VerifyError(
                "placeholders and signature disagree",
                needed=f"{len(self.signature.input_specs)} placeholders",
                found=f"{len(nodes)}",
            )
        yield from zip(nodes, self.signature.input_specs, strict=True)

    @property
    def user_inputs(self) -> list[fx.Node]:
        """The placeholders that the caller feeds, in order."""
        return [node for node, spec in self.input_specs() if spec.kind is InputKind.USER_INPUT]

    def tensor_of(self, node: fx.Node) -> torch.Tensor | None:
        """Return the tensor behind a parameter, buffer or constant placeholder, or None."""
        if node.op != "placeholder":
            return None
        for candidate, spec in self.input_specs():
            if candidate is node and spec.target is not None:
                value = self.state_dict.get(spec.target, self.constants.get(spec.target))
                return value if isinstance(value, torch.Tensor) else None
        return None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return every parameter, buffer and constant tensor by placeholder name."""
        found: dict[str, torch.Tensor] = {}
        for node, spec in self.input_specs():
            if spec.target is None:
                continue
            value = self.state_dict.get(spec.target, self.constants.get(spec.target))
            if isinstance(value, torch.Tensor):
                found[node.name] = value
        return found

    @property
    def output_node(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    @property
    def output_values(self) -> list[Any]:
        """The values that leave the graph, in the order of the signature."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]  # an output's first argument is a tuple

    def with_outputs(self, values: Mapping[str, fx.Node]) -> Program:
        """Return the program, over a graph of its own, with further outputs.

        Args:
            values: Nodes of this program by the outputs' names.
        """
        program = self.copied()
        nodes = {node.name: node for node in program.graph.nodes}
        output = program.output_node
        output.args = ((*program.output_values, *(nodes[value.name] for value in values.values())),)
        specs = list(self.signature.output_specs)
        specs += [ExportOutputSpec(OutputKind.USER_OUTPUT, TensorArgument(v.name), None) for v in values.values()]
        signature = ExportGraphSignature(input_specs=list(self.signature.input_specs), output_specs=specs)
        return replace(program, signature=signature, output_names=(*self.output_names, *values))

    def add_constant(self, name: str, tensor: torch.Tensor, fake: Any) -> tuple[Program, fx.Node]:
        """Lift a new constant tensor into the program.

        Args:
            name: Wished name; a suffix is added when it is taken.
            tensor: The value.
            fake: The fake tensor to record as ``meta["val"]``.

        Returns:
            The program with the extended signature, and the new placeholder.
        """
        taken = self.placeholders.keys() | self.constants.keys() | {node.name for node in self.graph.nodes}
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        first_user = self.user_inputs[0] if self.user_inputs else next(iter(self.graph.nodes))
        with self.graph.inserting_before(first_user):
            node = self.graph.create_node("placeholder", unique, name=unique)
        node.meta["val"] = fake
        position = next(
            (i for i, spec in enumerate(self.signature.input_specs) if spec.kind is InputKind.USER_INPUT),
            len(self.signature.input_specs),
        )
        specs = list(self.signature.input_specs)
        specs.insert(position, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), unique, None))
        signature = ExportGraphSignature(input_specs=specs, output_specs=list(self.signature.output_specs))
        program = replace(self, signature=signature, constants={**self.constants, unique: tensor})
        return program, node

    def refreshed(self) -> Program:
        """Drop unused state placeholders and make the signature agree with the graph's names."""
        specs: list[InputSpec] = []
        for node, spec in list(self.input_specs()):
            if spec.kind is not InputKind.USER_INPUT and not node.users:
                self.graph.erase_node(node)
                continue
            specs.append(_renamed(spec, node))
        outputs = [
            ExportOutputSpec(spec.kind, _argument(value), spec.target)
            for spec, value in zip(self.signature.output_specs, self.output_values, strict=True)
        ]
        signature = ExportGraphSignature(input_specs=specs, output_specs=outputs)
        return replace(self, signature=signature)

    @property
    def user_output_positions(self) -> list[int]:
        """Positions of the outputs that the caller gets (buffer mutations are not)."""
        return [i for i, spec in enumerate(self.signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]


def _input_names(exported: ExportedProgram) -> dict[str, str]:
    """Name the inputs as the caller does: nested ones by their path, with dots."""
    inputs = [s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    entry = exported.module_call_graph[0].signature
    if entry is None or entry.in_spec.num_leaves != len(inputs):
        return {name: name for name in inputs}
    args, kwargs = pytree.tree_unflatten(list(range(len(inputs))), entry.in_spec)
    names = dict(enumerate(inputs))
    for tree in (*(args if len(args) == len(inputs) else ()), kwargs):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if len(path) > 1:
                names[leaf] = ".".join(_path_part(key) for key in path)
    return {name: names[i] for i, name in enumerate(inputs)}


def _path_part(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _output_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Name the outputs after the keys of the model's result."""
    entry = exported.module_call_graph[0].signature
    positions = [s for s in exported.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    count = len(positions)
    if entry is None or entry.out_spec.num_leaves != count:
        return tuple(f"output_{i}" for i in range(count))
    tree: Any = pytree.tree_unflatten(list(range(count)), entry.out_spec)
    names: dict[int, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        parts = [_path_part(key) for key in path]
        if not parts:
            names[leaf] = "output"
        elif parts[0].isdigit():
            names[leaf] = "output_" + "_".join(parts)
        else:
            names[leaf] = ".".join(parts)
    # An output called like an input, or like another output, cannot be told apart in an engine.
    taken = {s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    for i in range(count):
        while names[i] in taken:
            names[i] += "_out"
        taken.add(names[i])
    return tuple(names[i] for i in range(count))


def _renamed(spec: InputSpec, node: fx.Node) -> InputSpec:
    if isinstance(spec.arg, TensorArgument):
        return InputSpec(spec.kind, TensorArgument(name=node.name), spec.target, spec.persistent)
    return spec


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return ConstantArgument(name="", value=value)
    if isinstance(value.meta.get("val"), torch.Tensor):
        return TensorArgument(name=value.name)
    return SymIntArgument(name=value.name)


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the program and whether anything changed."""

    program: Program
    modified: bool


class Pass(Protocol):
    """A pass: a frozen dataclass whose fields are its options."""

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        ...
